"""The slot table: which KV block lies in which device slot.

Every row and kv head has its own C slots. Which of them a block list takes is for
`pallas_kernels.plan_slots` to say. The row's own block, the one that grows, is in every
list of its row (it is a forced local block), so the slot that holds it, the tail slot,
is never taken.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

EMPTY = -1


class SlotTable(NamedTuple):
    """Contents of the slots.

    Attributes:
      blocks: Block in each slot, −1 for none [*rows, C].
      last_used: Step of the last list that asked for it; −1 for never [*rows, C].
    """

    blocks: Int[Array, "*rows C"]
    last_used: Int[Array, "*rows C"]


def empty_table(shape: tuple[int, ...]) -> SlotTable:
    """A table without blocks; `shape` ends with C."""
    return SlotTable(jnp.full(shape, EMPTY, jnp.int32), jnp.full(shape, -1, jnp.int32))


def table_at(table: SlotTable, layer: int | Int[Array, ""]) -> SlotTable:
    """One layer's slots, of tables with a leading axis of layers."""
    return SlotTable(table.blocks[layer], table.last_used[layer])


def put_table(
    table: SlotTable, layer: int | Int[Array, ""], new: SlotTable
) -> SlotTable:
    """Tables with a leading axis of layers, one layer's replaced."""
    return SlotTable(
        table.blocks.at[layer].set(new.blocks),
        table.last_used.at[layer].set(new.last_used),
    )


def slot_of(
    table_blocks: Int[Array, "*rows C"], block: Int[Array, "*#rows"]
) -> Int[Array, "*rows"]:
    """The slot that holds `block`, or −1."""
    holds = table_blocks == block[..., None]
    slot = jnp.argmax(holds, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(holds, axis=-1), slot, EMPTY)
