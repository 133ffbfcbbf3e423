"""The plan in XLA: lookups, one sort of the stamps, and scatters.

A listed block is looked up in the page table, so that what is asked for costs as much
as the list is long. Only the choice of victims looks at all slots: a sort of their
stamps. XLA's cumulative sum is several times slower on a GPU than a comparison matrix
over rows as short as a block list.

Measured on a CPU (JAX 0.12, two cores; microseconds of a call, comparison matrices of
[P, C] and [C, C] before): 2 rows of 96 blocks and slots 50 (99), 8 rows of 512 slots
360 (3,800), of 1,024 slots 560 (40,600).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.plan_slots.operands import Slots
from pallas_kernels.plan_slots.plan import SlotPlan

EMPTY = -1
_LAST = 2**31 - 1


def running_count(marked: Bool[Array, "*rows P"]) -> Int[Array, "*rows P"]:
    """How many entries up to and including each one are marked."""
    place = jnp.arange(marked.shape[-1])
    upto = place[None, :] <= place[:, None]
    return jnp.sum(marked[..., None, :] & upto, axis=-1, dtype=jnp.int32)


def by_number(
    marked: Bool[Array, "R P"],
    number: Int[Array, "R P"],
    *values: Int[Array, "R P"],
) -> list[Int[Array, " PR"]]:
    """The values of marked entries, number by number: first every row's number 0.

    Args:
      marked: entries that count.
      number: of each of them among its row's, no number twice in a row.
      *values: what to list, none negative where marked.

    Returns:
      A list for each of the values, -1 where a row has no entry of a number.
    """
    nth = jnp.arange(marked.shape[1], dtype=jnp.int32)[:, None, None]
    here = marked & (number == nth)  # P R P
    return [
        jnp.max(jnp.where(here, value, EMPTY), axis=-1).reshape(-1) for value in values
    ]


def _put(
    table: Int[Array, "R size"],
    mask: Bool[Array, "R N"],
    place: Int[Array, "R N"],
    value: Int[Array, "R N"] | Int[Array, "R 1"] | int,
) -> Int[Array, "R size"]:
    """The table with values put where the mask holds, no place twice in a row."""
    row = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    # Each entry that is left out names a place of its own behind the end.
    behind = table.shape[1] + jnp.arange(mask.shape[1], dtype=jnp.int32)
    at = jnp.where(mask, place, behind)
    return table.at[row, at].set(value, mode="drop", unique_indices=True)


@in_32_bit
def plan_slots_xla(operands: Slots) -> SlotPlan:
    """Computes the result."""
    rows, budget = operands.rows, operands.budget
    capacity, row_blocks = operands.capacity, operands.row_blocks
    tables = (operands.blocks, operands.last_used, operands.page_table, operands.listed)
    blocks, last_used, page_table, listed = (x.reshape(-1, x.shape[-1]) for x in tables)
    step, tail_block = (x.reshape(-1, 1) for x in (operands.step, operands.tail_block))

    asked = listed >= 0
    held = jnp.take_along_axis(page_table, jnp.maximum(listed, 0), axis=1)
    held = jnp.where(asked, held, EMPTY)
    hit = held >= 0
    missing = asked & ~hit
    number = running_count(missing) - 1

    # The n-th miss takes the n-th victim: empty slots first, kept ones last, among
    # equals the lowest.
    age = _put(jnp.where(blocks < 0, -2, last_used), hit, held, _LAST)
    victims = lax.top_k(-age, budget)[1]
    victim = jnp.take_along_axis(victims, jnp.maximum(number, 0), axis=1)
    slots = jnp.where(hit, held, jnp.where(missing, victim, EMPTY))

    evicted = jnp.take_along_axis(blocks, jnp.maximum(slots, 0), axis=1)
    moved = jnp.concatenate((missing & (evicted >= 0), missing), axis=1)
    page_table = _put(
        page_table,
        moved,
        jnp.concatenate((evicted, listed), axis=1),
        jnp.concatenate((jnp.full_like(slots, EMPTY), slots), axis=1),
    )

    # A block that begins now has nothing to fetch.
    come = missing & (listed < tail_block)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    sources, targets = by_number(
        come,
        number,
        operands.source + row * row_blocks + listed,
        operands.target + row * capacity + slots,
    )
    return SlotPlan(
        slots=slots,
        blocks=_put(blocks, missing, slots, listed),
        last_used=_put(last_used, asked, slots, step),
        page_table=page_table,
        sources=sources,
        targets=targets,
        bound=rows * (1 + jnp.max(jnp.where(come, number, -1))),
        fetched=jnp.sum(come, dtype=jnp.int32),
        hits=jnp.sum(hit, dtype=jnp.int32),
    ).of_rows(operands.lead)
