"""Operands that both attentions read, as one group for every back end."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Blocks of keys and values, and how logits are made of them.

    Attributes:
      kv: blocks of keys (index 0 of the axis of 2) and values (index 1) of a stack of
        layers, of which no slice is copied; in decode a block is a slot.
      layer: int32, which layer of the stack.
      key_bias: float32, added to the scaled logits of each key; or None.
      scale: factor of the logits; a trace fixes it.
    """

    kv: Float[Array, "L B K M block 2 H"]
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
