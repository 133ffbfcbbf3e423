"""Both attentions against their float32 definitions, case by case."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    assert_attention_matches,
    combinations,
    in_ci,
    refused_by_triton,
)

from pallas_kernels import block_sparse_attention, paged_decode_attention
from pallas_kernels.block_sparse_attention import arg_specs as prefill_specs
from pallas_kernels.block_sparse_attention import operands as prefill_operands
from pallas_kernels.block_sparse_attention.pallas_triton import (
    block_sparse_attention_triton,
)
from pallas_kernels.block_sparse_attention.reference import (
    block_sparse_attention_reference,
)
from pallas_kernels.paged_decode_attention import arg_specs as decode_specs
from pallas_kernels.paged_decode_attention import operands as decode_operands
from pallas_kernels.paged_decode_attention.pallas_triton import (
    paged_decode_attention_triton,
)
from pallas_kernels.paged_decode_attention.reference import (
    paged_decode_attention_reference,
)


class Attention(NamedTuple):
    """An operation and its forms.

    Attributes:
      call: the operation.
      reference: its definition, compiled whole, once for each set of shapes.
      triton: its Triton form.
      operands_of: makes what its forms take of a call's arguments.
    """

    call: object
    reference: object
    triton: object
    operands_of: object

    def expected(self, args):
        return self.reference(self.operands_of(**args))

    def compiled(self, implementation):
        def f(args):
            return self.call(**args, return_lse=True, implementation=implementation)

        return jax.jit(f)


PREFILL = Attention(
    block_sparse_attention,
    jax.jit(block_sparse_attention_reference),
    block_sparse_attention_triton,
    prefill_operands.checked,
)
DECODE = Attention(
    paged_decode_attention,
    jax.jit(paged_decode_attention_reference),
    paged_decode_attention_triton,
    decode_operands.checked,
)
QUICK = {
    PREFILL: {"random_g4", "local_g16_layers_bias"},
    DECODE: {"dense_empty_row", "listed_g16_layers_bias"},
}
# What is slower to compile gets by with one.
QUICKEST = {PREFILL: {"local_g16_layers_bias"}, DECODE: {"listed_g16_layers_bias"}}
SPECS = {PREFILL: prefill_specs.ARG_SPECS, DECODE: decode_specs.ARG_SPECS}
NAMES = {PREFILL: "prefill", DECODE: "decode"}


def cases(quick, *dtypes):
    return [
        pytest.param(op, *case.values, id=f"{NAMES[op]}-{case.id}", marks=case.marks)
        for op, specs in SPECS.items()
        for case in combinations(specs, *dtypes, quick=quick[op])
    ]


@pytest.mark.parametrize(
    ("op", "spec", "dtype"), cases(QUICK, "float32", "bfloat16", "float16")
)
def test_xla_matches_reference(op, spec, dtype):
    args = spec.make(dtype)
    got = op.compiled("xla")(args)
    assert got[0].dtype == jnp.dtype(dtype)
    assert got[1].dtype == jnp.float32
    assert_attention_matches(got, op.expected(args), dtype)


@pytest.mark.parametrize(
    ("op", "spec", "dtype"), cases(QUICKEST, "bfloat16", "float32")
)
def test_triton_matches_reference_in_the_interpreter(op, spec, dtype):
    args = spec.make(dtype)
    run = functools.partial(op.triton, interpret=True)
    operands = op.operands_of(**args)
    if refused_by_triton(spec, dtype):
        with pytest.raises(NotImplementedError, match="no room for tiles"):
            run(operands)
        return
    got = jax.jit(run)(operands)
    assert_attention_matches(got, op.expected(args), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("op", "spec"),
    [
        pytest.param(op, spec, id=f"{NAMES[op]}-{spec.name}")
        for op, specs in SPECS.items()
        for spec in in_ci(specs)
    ],
)
def test_native_matches_reference(op, spec, dtype, implementation):
    args, f = spec.make(dtype), op.compiled(implementation)
    try:
        got = f(args)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    assert_attention_matches(got, op.expected(args), dtype)
    for x, y in zip(got, f(args), strict=True):
        np.testing.assert_array_equal(x, y)
