"""What holds for every operation and its cases."""

import functools
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import in_ci

import pallas_kernels
from pallas_kernels.lowering import cuda_lowering_text


class Op(NamedTuple):
    """An operation and how its cases are lowered.

    Attributes:
      call: the operation.
      implementations: Pallas forms that it has.
      quick: cases of the default tests; that of 64-bit mode is the first of them, by
        the first form.
      extra: arguments beside those of a case.
      typed: a case is drawn in a dtype.
    """

    call: object
    implementations: tuple[str, ...] = ("triton", "mosaic_gpu")
    quick: tuple[str, ...] = ()
    extra: Mapping = MappingProxyType({})
    typed: bool = True


OPS = {
    "block_scores": Op(
        pallas_kernels.select_blocks,
        quick=("softmax_g16_layers", "raw_no_window"),
        extra={"budget": 6, "return_lse": True},
    ),
    "block_sparse_attention": Op(
        pallas_kernels.block_sparse_attention,
        quick=("local_g16_layers_bias",),
        extra={"return_lse": True},
    ),
    "choose_blocks": Op(
        pallas_kernels.choose_blocks, ("triton",), ("forced",), typed=False
    ),
    "commit_blocks": Op(
        pallas_kernels.commit_blocks,
        quick=("int8",),
        extra={"count": jnp.int32(3)},
    ),
    "compress_keys": Op(pallas_kernels.compress_keys, quick=("minicpm", "too_short")),
    "host_gather": Op(
        pallas_kernels.host_gather, quick=("skips",), extra={"programs": 16}
    ),
    "paged_decode_attention": Op(
        pallas_kernels.paged_decode_attention,
        quick=("listed_g16_layers_bias",),
        extra={"return_lse": True},
    ),
    "plan_slots": Op(
        pallas_kernels.plan_slots, ("triton",), ("one_slot_more",), typed=False
    ),
}


def specs_of(op):
    return importlib.import_module(f"pallas_kernels.{op}.arg_specs").ARG_SPECS


def _cases():
    for name, op in OPS.items():
        for spec in in_ci(specs_of(name)):
            for implementation in op.implementations:
                for x64 in (False, True):
                    first = implementation == op.implementations[0]
                    quick = op.quick[: int(first)] if x64 else op.quick
                    bits = "x64" if x64 else "x32"
                    yield pytest.param(
                        name,
                        spec,
                        implementation,
                        x64,
                        id=f"{name}-{spec.name}-{implementation}-{bits}",
                        marks=() if spec.name in quick else pytest.mark.slow,
                    )


def _served(op, spec, implementation):
    """Whether the case is one that the implementation takes."""
    if (op, implementation) == ("paged_decode_attention", "mosaic_gpu"):
        # Blocks of 64 and 128 tokens.
        return spec.block >= 64
    if (op, implementation) == ("commit_blocks", "mosaic_gpu"):
        return not spec.int8
    return True


@pytest.mark.parametrize(("name", "spec", "implementation", "x64"), list(_cases()))
def test_pallas_lowers_for_cuda(name, spec, implementation, x64):
    op = OPS[name]
    args = (spec.make("bfloat16") if op.typed else spec.make()) | dict(op.extra)
    arrays = {n: x for n, x in args.items() if isinstance(x, jax.Array)}
    fixed = {n: x for n, x in args.items() if n not in arrays}
    call = functools.partial(op.call, implementation=implementation, **fixed)

    def f(a):
        return call(**a)

    if not _served(name, spec, implementation):
        with pytest.raises(NotImplementedError):
            cuda_lowering_text(f, arrays, x64=x64)
        return
    text = cuda_lowering_text(f, arrays, x64=x64)
    # What has no window has no kernel.
    assert implementation in text or spec.name == "too_short"


@pytest.mark.parametrize("name", OPS)
def test_cases_are_told_apart_by_name(name):
    names = [spec.name for spec in specs_of(name)]
    assert len(names) == len(set(names))
    assert set(OPS[name].quick) <= set(names)


def test_every_operation_is_here():
    assert set(OPS) == set(pallas_kernels.__all__) - {"select_blocks"}
