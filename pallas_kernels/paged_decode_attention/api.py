"""Public entry of paged decode attention: checks, then dispatch."""

from __future__ import annotations

from typing import Literal, overload

import jax
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.paged_decode_attention.operands import checked
from pallas_kernels.paged_decode_attention.xla import (
    paged_decode_attention_xla,
    scratch_bytes,
)

__all__ = ["OP", "paged_decode_attention", "scratch_bytes"]

OP = "paged_decode_attention"


@overload
def paged_decode_attention(
    q: Float[Array, "B N H"],
    kv: Float[Array, "*L B K C block 2 H"] | Int8[Array, "*L B K C block 2 H"],
    *,
    slots: Int[Array, "B K P"] | None = ...,
    slot_lengths: Int[Array, "B K P"] | None = ...,
    lengths: Int[Array, " B"] | None = ...,
    layer: Int[Array, ""] | int | None = ...,
    key_bias: Float[Array, "*L B K C block"] | None = ...,
    scales: Float[Array, "*L B K C S"] | None = ...,
    tail: Float[Array, "*L B K block 2 H"] | None = ...,
    tail_lengths: Int[Array, " B"] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Float[Array, "B N H"]: ...


@overload
def paged_decode_attention(
    q: Float[Array, "B N H"],
    kv: Float[Array, "*L B K C block 2 H"] | Int8[Array, "*L B K C block 2 H"],
    *,
    slots: Int[Array, "B K P"] | None = ...,
    slot_lengths: Int[Array, "B K P"] | None = ...,
    lengths: Int[Array, " B"] | None = ...,
    layer: Int[Array, ""] | int | None = ...,
    key_bias: Float[Array, "*L B K C block"] | None = ...,
    scales: Float[Array, "*L B K C S"] | None = ...,
    tail: Float[Array, "*L B K block 2 H"] | None = ...,
    tail_lengths: Int[Array, " B"] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]: ...


def paged_decode_attention(
    q: Float[Array, "B N H"],
    kv: Float[Array, "*L B K C block 2 H"] | Int8[Array, "*L B K C block 2 H"],
    *,
    slots: Int[Array, "B K P"] | None = None,
    slot_lengths: Int[Array, "B K P"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    key_bias: Float[Array, "*L B K C block"] | None = None,
    scales: Float[Array, "*L B K C S"] | None = None,
    tail: Float[Array, "*L B K block 2 H"] | None = None,
    tail_lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"] | tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Attends with one query token a row over key-value slots.

    Dense attention (``slots=None``, slot c holds tokens c * block ...), sparse
    attention (the selected blocks) and attention over a device cache of offloaded
    blocks (the slot table) are one computation: the order of slots carries no
    meaning, because positions are rotated into the keys.

    Follows the second stage of InfLLM-V2 at decode (reference implementation
    NVlabs/SparDA, ``infllmv2_sparse_attention.py``); ``key_bias`` is NOSA's additive
    term, which the reference computes as two attention calls.

    Args:
      q: one query token a row, in float32, bfloat16 or float16. Query head n reads
        kv head n // (N // K).
      kv: slots in the dtype of ``q``, or int8 with ``scales``; index 0 of the axis of 2
        is the key, 1 the value. With ``layer``, a stack of them, of which no slice is
        copied.
      slots: int32, the slots that each row and kv head reads; -1 is padding, allowed
        anywhere; any order; no slot twice.
      slot_lengths: int32, valid tokens of each listed slot: ``block``, fewer for the
        tail, 0 or less for none. Required exactly when ``slots`` is given.
      lengths: int32, valid tokens of each row. Required exactly when ``slots`` is
        None. Values beyond the capacity mean all of it.
      layer: which layer of a stacked ``kv`` (int or int32 scalar, traced or not).
      key_bias: float32, added to the scaled logits of each key.
      scales: float32, for slots in 8 bits (``kv`` is int8): of each slot H for K's
        channels, then one for each of V's tokens, then any padding; a number is its
        integer times its scale. Not with ``key_bias``.
      tail: with ``scales``: one more block a row and kv head in the dtype of ``q``,
        attended to beside the slots.
      tail_lengths: with ``scales``: int32, its valid tokens; 0 or less for none.
      scale: factor of the logits; ``H ** -0.5`` by default.
      return_lse: also return the log-sum-exp of the logits, to merge partial results.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      The output in the dtype of ``q``, 0 for a row that reads no key; with
      ``return_lse`` also the float32 log-sum-exp, -inf for such a row.

    Raises:
      ValueError: on shapes, dtypes or argument combinations other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(
        q,
        kv,
        slots=slots,
        slot_lengths=slot_lengths,
        lengths=lengths,
        layer=layer,
        key_bias=key_bias,
        scales=scales,
        tail=tail,
        tail_lengths=tail_lengths,
        scale=scale,
    )

    def run(name: str) -> tuple[jax.Array, jax.Array]:
        return _implementation(name)(operands)

    out, lse = dispatch(OP, implementation, run)
    return (out, lse) if return_lse else out


def _implementation(name: str):
    """The function behind a name. The Pallas modules are imported on first use."""
    if name == "mosaic_gpu":
        from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu

        return pallas_mosaic_gpu.paged_decode_attention_mosaic_gpu
    if name == "triton":
        from pallas_kernels.paged_decode_attention import pallas_triton

        return pallas_triton.paged_decode_attention_triton
    return paged_decode_attention_xla
