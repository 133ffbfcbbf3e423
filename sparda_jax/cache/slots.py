"""The slot table: which KV block lies in which device slot, and which one goes next.

Every row and kv head has its own C slots. A block list asks for P ≤ C blocks; those
that lie in a slot stay there (hits), the others (misses) take the slots that the list
does not ask for, empty ones first, then the least recently asked for. The row's own
block, the one that grows, is in every list of its row (it is a forced local block), so
the slot that holds it, the tail slot, is never taken.

Everything is comparison matrices of [P, C] and [C, C] per row and head: a few small
fused kernels on a GPU, no sort, no scatter and no loop.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

EMPTY = -1


class SlotTable(NamedTuple):
    """Contents of the slots.

    Attributes:
      blocks: Block in each slot, −1 for none [*rows, C].
      used: Stamp of the last list that asked for it; −1 for never [*rows, C].
    """

    blocks: Int[Array, "*rows C"]
    used: Int[Array, "*rows C"]


class SlotPlan(NamedTuple):
    """What a block list means for the slots.

    Attributes:
      slots: Where each listed block lies, or will [*rows, P]; −1 for padding.
      missing: Listed blocks that no slot held [*rows, P].
      number: Of each missing block among those of its row [*rows, P].
      table: The table once they are in.
    """

    slots: Int[Array, "*rows P"]
    missing: Bool[Array, "*rows P"]
    number: Int[Array, "*rows P"]
    table: SlotTable


def empty_table(shape: tuple[int, ...]) -> SlotTable:
    """A table without blocks; `shape` ends with C."""
    return SlotTable(jnp.full(shape, EMPTY, jnp.int32), jnp.full(shape, -1, jnp.int32))


def running_count(marked: Bool[Array, "*rows P"]) -> Int[Array, "*rows P"]:
    """How many entries up to and including each one are marked.

    A comparison matrix: for rows as short as a block list one fused kernel, where
    XLA's cumulative sum on a GPU is several times slower.
    """
    place = jnp.arange(marked.shape[-1])
    upto = place[None, :] <= place[:, None]
    return jnp.sum(marked[..., None, :] & upto, axis=-1, dtype=jnp.int32)


def by_number(
    marked: Bool[Array, "N P"],
    number: Int[Array, "N P"],
    *values: Int[Array, "N P"],
) -> list[Int[Array, " PN"]]:
    """The values of marked entries, number by number: first every row's number 0.

    Args:
      marked: Entries that count.
      number: Of each of them among its row's, no number twice in a row.
      *values: What to list, none negative where marked.

    Returns:
      A list for each of the values, in which entry n·N + r is that of row r's number n,
      and −1 where there is none. However the marked entries are spread over the rows,
      they lie in front but for gaps, and no scatter is needed to put them there.
    """
    turn = jnp.arange(marked.shape[1], dtype=jnp.int32)[:, None, None]
    here = marked & (number == turn)  # P N P
    return [
        jnp.max(jnp.where(here, value, EMPTY), axis=-1).reshape(-1) for value in values
    ]


def plan_slots(
    table: SlotTable, listed: Int[Array, "*rows P"], stamp: Int[Array, "*rows"]
) -> SlotPlan:
    """Gives every listed block a slot.

    Args:
      table: The slots as they are.
      listed: Block ids without duplicates, −1 padded anywhere; P ≤ C.
      stamp: The lists' time; must not go back for a row.

    Returns:
      Slots, misses and the new table. Slots that the list does not name keep their
      block unless a miss takes them: empty ones first, then by the oldest stamp, ties
      by slot index.
    """
    asked = listed >= 0
    holds = (listed[..., :, None] == table.blocks[..., None, :]) & asked[..., None]
    hit = jnp.any(holds, axis=-1)
    missing = asked & ~hit
    kept = jnp.any(holds, axis=-2)

    # The n-th miss takes the n-th victim. A slot's turn is how many others go before
    # it; kept slots go last.
    age = jnp.where(kept, jnp.iinfo(jnp.int32).max, table.used)
    age = jnp.where((table.blocks < 0) & ~kept, -2, age)
    slot = jnp.arange(age.shape[-1], dtype=jnp.int32)
    older = age[..., None, :] < age[..., :, None]
    tied = age[..., None, :] == age[..., :, None]
    before = older | (tied & (slot[None, :] < slot[:, None]))
    turn = jnp.sum(before, axis=-1, dtype=jnp.int32)
    number = running_count(missing) - 1
    takes = (number[..., :, None] == turn[..., None, :]) & missing[..., None]

    placed = holds | takes
    slots = jnp.where(asked, jnp.argmax(placed, axis=-1).astype(jnp.int32), EMPTY)
    incoming = jnp.max(jnp.where(takes, listed[..., :, None], EMPTY), axis=-2)
    taken = incoming >= 0
    return SlotPlan(
        slots=slots,
        missing=missing,
        number=number,
        table=SlotTable(
            blocks=jnp.where(taken, incoming, table.blocks),
            used=jnp.where(kept | taken, stamp[..., None], table.used),
        ),
    )


def slot_of(
    table_blocks: Int[Array, "*rows C"], block: Int[Array, "*#rows"]
) -> Int[Array, "*rows"]:
    """The slot that holds `block`, or −1."""
    holds = table_blocks == block[..., None]
    slot = jnp.argmax(holds, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(holds, axis=-1), slot, EMPTY)
