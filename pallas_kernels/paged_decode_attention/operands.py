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
class Decode(Attended):
    """One query token a row, its slots, and which of them it reads.

    Source: the second stage of InfLLM-V2 at decode (reference implementation
    NVlabs/SparDA, ``infllmv2_sparse_attention.py``).

    Attributes:
      q: queries in the dtype of ``kv``; head n reads kv head n // (N // K).
      slots: int32, listed slots, -1 for padding; None for all of them.
      slot_lengths: int32, valid tokens of each listed slot; None without a list.
      lengths: int32, valid tokens of each row; None with a list.
    """

    q: Float[Array, "B N H"]
    slots: Int[Array, "B K P"] | None
    slot_lengths: Int[Array, "B K P"] | None
    lengths: Int[Array, " B"] | None

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
    scale=None,
) -> Decode:
    """Checks arguments of ``paged_decode_attention`` and brings them to one form.

    Raises:
      ValueError: on shapes, dtypes or combinations other than the operation names.
    """
    validation.require_shape("q", q, (None, None, None), "B N H")
    attended = validation.attended(q, kv, layer, key_bias, scale)
    batch, kv_heads = attended["kv"].shape[1:3]
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
        q=q, slots=slots, slot_lengths=slot_lengths, lengths=lengths, **attended
    )
