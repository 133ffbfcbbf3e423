"""Operands that two operations share, as one group for every back end."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Blocks of keys and values, and how logits are made of them.

    Attributes:
      kv: blocks of keys (index 0 of the axis of 2) and values (index 1) of a stack of
        layers, of which no slice is copied; in decode a block is a slot, whose numbers
        may be integers of 8 bits.
      layer: int32, which layer of the stack.
      key_bias: float32, added to the scaled logits of each key; or None.
      scale: factor of the logits; a trace fixes it.
    """

    kv: Float[Array, "L B K M block 2 H"] | Int8[Array, "L B K M block 2 H"]
    layer: Int[Array, ""]
    key_bias: Float[Array, "L B K M block"] | None
    scale: float = field(metadata={"static": True})

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.kv.shape[2]

    @property
    def blocks(self) -> int:
        """M, blocks (slots) of a row."""
        return self.kv.shape[3]

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.kv.shape[4]

    @property
    def head_dim(self) -> int:
        """H."""
        return self.kv.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Rows that are copied from or to, by their numbers.

    Attributes:
      indices: int32 rows, negative for none.
      count: int32, how many entries are looked at; None for all.
    """

    indices: Int[Array, " J"]
    count: Int[Array, ""] | None

    @property
    def listed(self) -> int:
        """J, entries in all."""
        return self.indices.shape[0]

    def looked_at(self) -> Int[Array, ""]:
        """How many entries are looked at."""
        return jnp.int32(self.listed) if self.count is None else self.count

    def masked(self) -> Int[Array, " J"]:
        """The list with -1 where nobody looks."""
        if self.count is None:
            return self.indices
        entry = jnp.arange(self.listed, dtype=jnp.int32)
        return jnp.where(entry < self.count, self.indices, -1)
