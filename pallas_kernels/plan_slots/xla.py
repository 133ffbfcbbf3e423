"""The plan in XLA: comparison matrices of [P, C] and [C, C] a row.

About ten small fused kernels on a GPU, without a sort, a scatter or a loop. XLA's
cumulative sum is several times slower there than a comparison matrix over rows as short
as a block list.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.plan_slots.plan import SlotPlan

EMPTY = -1


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


@in_32_bit
def plan_slots_xla(
    blocks: Int[Array, "*rows C"],
    last_used: Int[Array, "*rows C"],
    listed: Int[Array, "*rows P"],
    step: Int[Array, "*rows"],
    tail_block: Int[Array, "*rows"],
    source: Int[Array, ""],
    target: Int[Array, ""],
    *,
    row_blocks: int,
) -> SlotPlan:
    """Computes the result. Nothing is checked here."""
    asked = listed >= 0
    holds = (listed[..., :, None] == blocks[..., None, :]) & asked[..., None]
    hit = jnp.any(holds, axis=-1)
    missing = asked & ~hit
    kept = jnp.any(holds, axis=-2)

    # The n-th miss takes the n-th victim. A slot's rank is how many others go before
    # it; kept slots go last.
    age = jnp.where(kept, jnp.iinfo(jnp.int32).max, last_used)
    age = jnp.where((blocks < 0) & ~kept, -2, age)
    slot = jnp.arange(age.shape[-1], dtype=jnp.int32)
    older = age[..., None, :] < age[..., :, None]
    tied = age[..., None, :] == age[..., :, None]
    before = older | (tied & (slot[None, :] < slot[:, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    number = running_count(missing) - 1
    takes = (number[..., :, None] == rank[..., None, :]) & missing[..., None]

    placed = holds | takes
    slots = jnp.where(asked, jnp.argmax(placed, axis=-1).astype(jnp.int32), EMPTY)
    incoming = jnp.max(jnp.where(takes, listed[..., :, None], EMPTY), axis=-2)
    taken = incoming >= 0

    # A block that begins now has nothing to fetch.
    come = missing & (listed < tail_block[..., None])
    come, number, block, place = (
        x.reshape(-1, listed.shape[-1]) for x in (come, number, listed, slots)
    )
    row = jnp.arange(come.shape[0], dtype=jnp.int32)[:, None]
    sources, targets = by_number(
        come,
        number,
        source + row * row_blocks + block,
        target + row * blocks.shape[-1] + place,
    )
    return SlotPlan(
        slots=slots,
        blocks=jnp.where(taken, incoming, blocks),
        last_used=jnp.where(kept | taken, step[..., None], last_used),
        sources=sources,
        targets=targets,
        bound=come.shape[0] * (1 + jnp.max(jnp.where(come, number, -1))),
        fetched=jnp.sum(come, dtype=jnp.int32),
        hits=jnp.sum(hit, dtype=jnp.int32),
    )
