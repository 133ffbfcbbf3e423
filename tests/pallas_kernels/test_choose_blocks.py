"""The choice of blocks against its definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import in_ci

from pallas_kernels import choose_blocks
from pallas_kernels.choose_blocks.arg_specs import ARG_SPECS
from pallas_kernels.choose_blocks.forced import Forced
from pallas_kernels.choose_blocks.pallas_triton import (
    MOST_BLOCKS,
    Config,
    choose_blocks_triton,
)
from pallas_kernels.choose_blocks.reference import choose_blocks_reference

CI_SPECS = in_ci(ARG_SPECS)
QUICK = {"forced", "ties", "more_than_there_are"}
specs = pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)


def _want(args):
    return choose_blocks_reference(
        np.asarray(args["scores"]),
        np.asarray(args["own"]),
        args["budget"],
        args.get("forced"),
    )


def _bound(args, implementation):
    """A function of the call's arrays, and the arrays."""
    fixed = {k: v for k, v in args.items() if k not in ("scores", "own")}
    call = functools.partial(choose_blocks, implementation=implementation, **fixed)
    return call, {k: args[k] for k in ("scores", "own")}


def _same(got, want):
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


@specs
def test_xla(spec):
    args = spec.make()
    call, arrays = _bound(args, "xla")
    _same(jax.jit(call)(**arrays), _want(args))


# The interpreter compiles long for each size; the others repeat the same code.
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, id=s.name, marks=() if s.name in QUICK else pytest.mark.slow)
        for s in CI_SPECS
    ],
)
def test_triton_in_the_interpreter(spec):
    args = spec.make()
    own = jnp.broadcast_to(args["own"], args["scores"].shape[:-1])
    got = choose_blocks_triton(**args | {"own": own}, interpret=True)
    _same(got, _want(args))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda s: s.name)
def test_native(spec, implementation):
    args = spec.make()
    call, arrays = _bound(args, implementation)
    first, again = jax.jit(call)(**arrays), jax.jit(call)(**arrays)
    _same(first, _want(args))
    np.testing.assert_array_equal(first, again)


SMALL_SIZES = ((7, 1), (7, 16), (40, 1))
CHOOSE = {
    "triton": jax.jit(
        functools.partial(choose_blocks_triton, interpret=True),
        static_argnames="budget",
    ),
    "xla": jax.jit(
        functools.partial(choose_blocks, implementation="xla"),
        static_argnames="budget",
    ),
}


@pytest.mark.parametrize(
    ("blocks", "budget"),
    [
        (40, 16),
        *(pytest.param(*size, marks=pytest.mark.slow) for size in SMALL_SIZES),
    ],
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_value_is_in_its_place(data, blocks, budget):
    special = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, 1e-40, -1e-40, 3e38]
    row = st.lists(st.sampled_from(special), min_size=blocks, max_size=blocks)
    scores = np.array([[[data.draw(row)] * 3]], np.float32)
    own = np.array([[[blocks, blocks // 2, 0]]], np.int32)
    # Subnormal numbers are 0 where they are flushed.
    scores = np.where(np.abs(scores) < 1e-37, 0.0, scores).astype(np.float32)
    want = choose_blocks_reference(scores, own, budget)
    for call in CHOOSE.values():
        _same(call(jnp.asarray(scores), jnp.asarray(own), budget=budget), want)


@pytest.mark.parametrize("implementation", CHOOSE)
def test_zeros_of_either_sign_are_equal(implementation):
    scores = jnp.asarray([[-0.0, 0.0, -0.0, 0.0]], jnp.float32)
    got = CHOOSE[implementation](scores, jnp.asarray([3]), budget=2)
    assert np.sort(got).tolist() == [[0, 1]]


def test_own_is_broadcast():
    scores = jnp.zeros((2, 3, 1, 8))
    own = jnp.asarray([1, 4])[:, None, None]
    lists = choose_blocks(scores, own, budget=8)
    assert (jnp.sum(lists >= 0, -1)[..., 0] == jnp.asarray([[2] * 3, [5] * 3])).all()


def test_no_gradient_passes():
    def total(scores):
        lists = choose_blocks(scores, jnp.asarray([7]), budget=3)
        return jnp.sum(jnp.where(lists >= 0, lists, 0).astype(jnp.float32))

    assert not jax.grad(total)(jnp.arange(8.0)[None]).any()


def test_refusals():
    args = CI_SPECS[0].make()
    with pytest.raises(NotImplementedError, match="no choose_blocks"):
        choose_blocks(**args, implementation="mosaic_gpu")
    long = jnp.zeros((1, MOST_BLOCKS + 1))
    with pytest.raises(NotImplementedError, match=f"at most {MOST_BLOCKS} blocks"):
        choose_blocks_triton(long, jnp.zeros((1,), jnp.int32), budget=2, interpret=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": jnp.zeros((3,))}, "scores has shape"),
        ({"scores": jnp.zeros((2, 2, 1, 8), jnp.bfloat16)}, "scores has dtype"),
        ({"own": jnp.zeros((2, 2, 1))}, "own has dtype"),
        ({"own": jnp.zeros((2, 3, 1), jnp.int32)}, "own has shape"),
        ({"budget": -1}, "budget is -1"),
        ({"forced": Forced(-1, 2)}, "forced.first is -1"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make() | change
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_blocks(**args)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_warps is 3"):
        Config(3)
