"""What every back end of paged decode attention takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels._common.operands import Attended


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stored:
    """What slots in 8 bits have beside them.

    Attributes:
      scales: float32, of each slot: of K's channels, of V's tokens, padding
        (``commit_blocks.int8``).
      tail: a further block of each row and kv head in the dtype of the queries, which
        is attended to as well: the one that grows.
      tail_lengths: int32, its valid tokens.
    """

    scales: Float[Array, "L B K C S"]
    tail: Float[Array, "L B K block 2 H"]
    tail_lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decode(Attended):
    """One query token a row, its slots, and which of them it reads.

    Source: the second stage of InfLLM-V2 at decode (reference implementation
    NVlabs/SparDA, ``infllmv2_sparse_attention.py``).

    Attributes:
      q: queries in the dtype of ``kv``; head n reads kv head n // (N // K).
      slots: int32, listed slots, -1 for padding; None for all of them.
      slot_lengths: int32, valid tokens of each listed slot; None without a list.
      lengths: int32, valid tokens of each row; None with a list.
      stored: what slots in 8 bits have beside them; None for others.
    """

    q: Float[Array, "B N H"]
    slots: Int[Array, "B K P"] | None
    slot_lengths: Int[Array, "B K P"] | None
    lengths: Int[Array, " B"] | None
    stored: Stored | None = None

    @property
    def groups(self) -> int:
        """G, query heads of a kv head."""
        return self.q.shape[1] // self.kv_heads

    @property
    def listed(self) -> int:
        """Slots that are looked at: P, or all without a list."""
        return self.blocks if self.slots is None else self.slots.shape[-1]


def checked(
    q,
    kv,
    *,
    slots=None,
    slot_lengths=None,
    lengths=None,
    layer=None,
    key_bias=None,
    scales=None,
    tail=None,
    tail_lengths=None,
    scale=None,
) -> Decode:
    """Checks arguments of ``paged_decode_attention`` and brings them to one form.

    Raises:
      ValueError: on shapes, dtypes or combinations other than the operation names.
    """
    validation.require_shape("q", q, (None, None, None), "B N H")
    in_8_bits = not (scales is None and tail is None and tail_lengths is None)
    attended = validation.attended(q, kv, layer, key_bias, scale, in_8_bits=in_8_bits)
    batch, kv_heads = attended["kv"].shape[1:3]
    stored = None
    if in_8_bits:
        stored = _stored(q, attended, scales, tail, tail_lengths)
    if slots is None:
        if lengths is None or slot_lengths is not None:
            raise ValueError(
                "slots is None: lengths must be given, and slot_lengths must not"
            )
        validation.require_shape("lengths", lengths, (batch,), "B")
        validation.require_integer("lengths", lengths)
        lengths = lengths.astype(jnp.int32)
    else:
        if slot_lengths is None or lengths is not None:
            raise ValueError(
                "slots is given: slot_lengths must be given, and lengths must not"
            )
        validation.require_shape("slots", slots, (batch, kv_heads, None), "B K P")
        validation.require_shape("slot_lengths", slot_lengths, slots.shape, "B K P")
        validation.require_integer("slots", slots)
        validation.require_integer("slot_lengths", slot_lengths)
        if slots.shape[-1] < 1:
            raise ValueError("slots lists no slot (P = 0); P must be at least 1")
        slots = slots.astype(jnp.int32)
        slot_lengths = slot_lengths.astype(jnp.int32)
    return Decode(
        q=q,
        slots=slots,
        slot_lengths=slot_lengths,
        lengths=lengths,
        stored=stored,
        **attended,
    )


def _stored(q, attended, scales, tail, tail_lengths) -> Stored:
    """Checks what slots in 8 bits have beside them.

    Raises:
      ValueError: if one of them is missing or does not fit, or with a key bias.
    """
    if scales is None or tail is None or tail_lengths is None:
        raise ValueError(
            "scales, tail and tail_lengths must be given together: slots in 8 bits "
            "have them, others none"
        )
    if attended["key_bias"] is not None:
        raise ValueError("key_bias must not be given with slots in 8 bits")
    kv = attended["kv"]
    if scales.ndim == kv.ndim - 3:  # no axis of layers
        scales, tail = scales[None], tail[None]
    validation.require_shape("scales", scales, (*kv.shape[:4], None), "L B K C S")
    validation.require_dtype("scales", scales, jnp.float32)
    least = kv.shape[-1] + kv.shape[4]
    if scales.shape[-1] < least:
        raise ValueError(
            f"scales has {scales.shape[-1]} a slot; it must be at least {least}: one "
            "for each channel of K and each token of V"
        )
    size = (*kv.shape[:3], *kv.shape[4:])
    validation.require_shape("tail", tail, size, "L B K block 2 H")
    validation.require_dtype("tail", tail, q.dtype)
    validation.require_shape("tail_lengths", tail_lengths, kv.shape[1:2], "B")
    validation.require_integer("tail_lengths", tail_lengths)
    tail_lengths = tail_lengths.astype(jnp.int32)
    return Stored(scales=scales, tail=tail, tail_lengths=tail_lengths)
