"""The device side of an offloaded layer: its slots, their table and its index."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparda_jax.cache.codecs import BlockCodec, Parts
from sparda_jax.cache.slots import SlotTable
from sparda_jax.sparse.index import IndexState


class OffloadLayer(NamedTuple):
    """Device side of one offloaded layer, or of all of them (leading axis).

    Attributes:
      slots: [layers, B, K, C, block, 2, H]; integers where slots hold blocks as they
        are stored (`BlockCodec.in_slots`).
      table: Contents of the slots [layers, B, K, C].
      key_bias: NOSA's c per token [layers, B, K, M, block] float32, or None.
      index: What the selector keeps of the keys, by part (`sparse.index`).
      scales: Of slots in 8 bits [layers, B, K, C, S], else None.
      tail: The growing block of each row, beside such slots, else None.
    """

    slots: Shaped[Array, "layers B K C block 2 H"]
    table: SlotTable
    key_bias: Float[Array, "layers B K M block"] | None
    index: IndexState
    scales: Float[Array, "layers B K C S"] | None = None
    tail: Float[Array, "layers B K block 2 H"] | None = None

    @property
    def held(self) -> Parts:
        """The slots' arrays, as `BlockCodec.slot_shapes` has them."""
        return (self.slots,) if self.scales is None else (self.slots, self.scales)

    def holding(self, held: Parts) -> "OffloadLayer":
        """A copy with these slots."""
        slots, *scales = held
        return self._replace(slots=slots, scales=scales[0] if scales else None)


def as_slots_hold(
    codec: BlockCodec,
    filled: Float[Array, "B K C block 2 H"],
    kv: Float[Array, "1 B K M block 2 H"],
    wanted: Int[Array, "B K C"],
    full: tuple[Int[Array, " B"], Int[Array, " B"]],
) -> tuple[Array, Array | None, Array | None]:
    """Blocks for slots as a fetch would bring them, their scales and the tail.

    So it does not matter when a block leaves its slot.

    Args:
      codec: How blocks are stored.
      filled: The blocks.
      kv: All blocks of the layer.
      wanted: Which they are.
      full: Full blocks of each row, before and now.
    """
    before, now = full
    if codec.in_slots:
        # What was stored before is encoded to what it was (`Int8Codec`).
        filled, scales = codec.for_slots(filled)
        rows, kv_heads = jnp.ogrid[: kv.shape[1], : kv.shape[2]]
        own = jnp.minimum(now, kv.shape[3] - 1)[:, None]
        return filled, scales, kv[0, rows, kv_heads, own]
    if not codec.exact:
        # What was stored before has come from there.
        new = (wanted >= before[:, None, None]) & (wanted < now[:, None, None])
        stored = codec.stored(filled)
        filled = jnp.where(new[..., None, None, None], stored, filled)
    return filled, None, None
