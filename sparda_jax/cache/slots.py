"""The slot table: which KV block is in which device slot, and the other way round.

Every row and kv head has its own C slots. Which of them a block list takes is for
`pallas_kernels.plan_slots` to say. The row's own block, the one that grows, is in every
list of its row (it is a forced local block), so the slot that holds it, the tail slot,
is never taken.

Where every block has a slot (C = M), slot b is block b's: nothing is evicted or
fetched, and `plan_own_slots` has nothing to plan.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.plan_slots.plan import SlotPlan

EMPTY = -1


class SlotTable(NamedTuple):
    """Contents of the slots.

    Attributes:
      blocks: Block in each slot, −1 for none [*rows, C].
      last_used: Step of the last list that asked for it; −1 for never [*rows, C].
      page_table: Slot of each block, −1 for none [*rows, M].
    """

    blocks: Int[Array, "*rows C"]
    last_used: Int[Array, "*rows C"]
    page_table: Int[Array, "*rows M"]

    @property
    def own_slots(self) -> bool:
        """Whether every block has a slot of its own."""
        return self.blocks.shape[-1] == self.page_table.shape[-1]


def empty_table(rows: tuple[int, ...], slots: int, num_blocks: int) -> SlotTable:
    """A table of C slots without blocks, for rows of M blocks."""
    return SlotTable(
        blocks=jnp.full((*rows, slots), EMPTY, jnp.int32),
        last_used=jnp.full((*rows, slots), -1, jnp.int32),
        page_table=jnp.full((*rows, num_blocks), EMPTY, jnp.int32),
    )


def filled_table(
    blocks: Int[Array, "B K C"], last_used: Int[Array, "B K C"], num_blocks: int
) -> SlotTable:
    """The table of slots with these contents, no block twice in a row."""
    batch, heads, slots = blocks.shape
    rows, kv_heads, slot = jnp.ogrid[:batch, :heads, :slots]
    # Each empty slot names a block of its own behind the end.
    block = jnp.where(blocks < 0, num_blocks + slot, blocks)
    pages = jnp.full((batch, heads, num_blocks), EMPTY, jnp.int32)
    pages = pages.at[rows, kv_heads, block].set(slot, mode="drop", unique_indices=True)
    return SlotTable(blocks, last_used, pages)


def table_at(table: SlotTable, layer: int | Int[Array, ""]) -> SlotTable:
    """One layer's slots, of tables with a leading axis of layers."""
    return SlotTable(*(part[layer] for part in table))


def put_table(
    table: SlotTable, layer: int | Int[Array, ""], new: SlotTable
) -> SlotTable:
    """Tables with a leading axis of layers, one layer's replaced."""
    pairs = zip(table, new, strict=True)
    return SlotTable(*(old.at[layer].set(part) for old, part in pairs))


def slot_of(table: SlotTable, block: Int[Array, "*#rows"]) -> Int[Array, "*rows"]:
    """The slot that holds `block`, or −1."""
    block = jnp.broadcast_to(block, table.page_table.shape[:-1])[..., None]
    inside = (block >= 0) & (block < table.page_table.shape[-1])
    at = jnp.where(inside, block, 0)
    slot = jnp.take_along_axis(table.page_table, at, axis=-1)
    return jnp.where(inside, slot, EMPTY)[..., 0]


def plan_own_slots(
    table: SlotTable,
    listed: Int[Array, "B K P"],
    step: Int[Array, "B K"],
) -> SlotPlan:
    """`plan_slots` where every block has a slot of its own: there is nothing to plan.

    Args:
      table: The slots; slot b holds block b, or nothing.
      listed: Block lists, of blocks that are in their slots or begin now.
      step: Step of each row's list.
    """
    batch, heads, width = listed.shape
    rows, kv_heads, entry = jnp.ogrid[:batch, :heads, :width]
    asked, count = listed >= 0, table.blocks.shape[-1]
    at = (rows, kv_heads, jnp.where(asked, listed, count + entry))
    held = table.page_table[rows, kv_heads, jnp.where(asked, listed, 0)]
    put = {"mode": "drop", "unique_indices": True}
    nothing = jnp.full((batch * heads * width,), EMPTY, jnp.int32)
    return SlotPlan(
        slots=listed,
        blocks=table.blocks.at[at].set(listed, **put),
        last_used=table.last_used.at[at].set(step[..., None], **put),
        page_table=table.page_table.at[at].set(listed, **put),
        sources=nothing,
        targets=nothing,
        bound=jnp.int32(0),
        fetched=jnp.int32(0),
        hits=jnp.sum(asked & (held >= 0), dtype=jnp.int32),
    )
