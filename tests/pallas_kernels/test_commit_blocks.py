"""The commit of staged blocks against its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import slow_but

from pallas_kernels import commit_blocks
from pallas_kernels.commit_blocks.arg_specs import ARG_SPECS
from pallas_kernels.commit_blocks.operands import checked
from pallas_kernels.commit_blocks.pallas_triton import Config, commit_blocks_triton
from pallas_kernels.commit_blocks.reference import commit_blocks_reference
from pallas_kernels.lowering import cuda_lowering_text

CI_SPECS = [s for s in ARG_SPECS if "ci" in s.tags]
INT8 = {"staged": jnp.zeros((10, 64, 2, 128), jnp.int8)}
specs = pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)


def _same(got, want):
    got, want = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", slow_but({"bfloat16"}, ("float32", "bfloat16")))
@specs
def test_xla(spec, dtype):
    args = spec.make(dtype)
    got = jax.jit(lambda a: commit_blocks(**a, implementation="xla"))(args)
    _same(got, commit_blocks_reference(checked(**args)))


@pytest.mark.parametrize("programs", slow_but({5}, (1, 5, 528)))
@specs
def test_triton_in_the_interpreter(spec, programs):
    args = spec.make("bfloat16")
    config = Config(programs=programs, part_bytes=4096)
    got = commit_blocks_triton(checked(**args), config=config, interpret=True)
    _same(got, commit_blocks_reference(checked(**args)))


def test_int8_is_numpys():
    """Number by number, rounded once."""
    [spec] = [s for s in CI_SPECS if s.name == "int8_odd_heads"]
    args = spec.make("bfloat16")
    whole, scales = np.asarray(args["staged"]), np.asarray(args["scales"])
    tokens, _, dim = spec.block
    want = np.asarray(args["slots"], np.float32)
    for entry, row in enumerate(np.asarray(args["indices"])):
        if row >= 0:
            for token in range(tokens):
                k = whole[entry, token, 0].astype(np.float32) * scales[entry, :dim]
                v = (
                    whole[entry, token, 1].astype(np.float32)
                    * scales[entry, dim + token]
                )
                want[row, token] = np.asarray(jnp.asarray((k, v), jnp.bfloat16))
    _same(commit_blocks_reference(checked(**args)), jnp.asarray(want))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@specs
def test_native(spec, implementation):
    args = spec.make("bfloat16")
    if spec.int8 and implementation == "mosaic_gpu":
        with pytest.raises(NotImplementedError, match="int8"):
            commit_blocks(**args, implementation=implementation)
        return
    got = jax.jit(lambda a: commit_blocks(**a, implementation=implementation))(args)
    _same(got, commit_blocks_reference(checked(**args)))


def test_entries_behind_the_count_are_not_looked_at():
    args = CI_SPECS[0].make("bfloat16")
    first = dict(args, indices=args["indices"].at[4:].set(-1))
    want = commit_blocks_reference(checked(**first))
    got = commit_blocks(**args, count=jnp.int32(4), implementation="xla")
    _same(got, want)
    operands = checked(**args, count=jnp.int32(4))
    _same(commit_blocks_triton(operands, interpret=True), want)


def test_in_place():
    """A donated array is updated where it is."""
    args = CI_SPECS[0].make("float32")
    call = jax.jit(commit_blocks, donate_argnames="slots")
    text = call.lower(**args).compile().as_text()
    # Keyword arguments are sorted: the slots are the second one.
    assert "input_output_alias={ {}: (1" in text


def test_mosaic_is_in_place():
    args = CI_SPECS[0].make("bfloat16")

    def loop(slots, staged, indices):
        def step(_, slots):
            return commit_blocks(slots, staged, indices, implementation="mosaic_gpu")

        return jax.lax.fori_loop(0, 2, step, slots)

    text = cuda_lowering_text(loop, args["slots"], args["staged"], args["indices"])
    [call] = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert "output_operand_alias" in call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": jnp.zeros((3,))}, "slots has shape"),
        ({"staged": jnp.zeros((3, 4))}, "staged has shape"),
        ({"staged": jnp.zeros((10, 64, 2, 128), jnp.bfloat16)}, "staged has dtype"),
        ({"indices": jnp.zeros((10,))}, "indices has dtype"),
        ({"scales": jnp.zeros((10, 256))}, "staged has dtype"),
        (INT8 | {"scales": jnp.zeros((10, 100))}, "scales has shape (10, 100)"),
        (INT8 | {"scales": jnp.zeros((9, 256))}, "scales has shape (9, 256)"),
        (INT8 | {"scales": jnp.zeros((10, 256), jnp.int8)}, "scales has dtype int8"),
        (
            {"slots": jnp.zeros((24, 9)), "staged": jnp.zeros((10, 9), jnp.int8)}
            | {"scales": jnp.zeros((10, 256))},
            "with scales it must be [R, block, 2, H]",
        ),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make("float32") | change
    with pytest.raises(ValueError, match=re.escape(message)):
        commit_blocks(**args)
