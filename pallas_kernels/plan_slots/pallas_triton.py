"""The plan on Triton: one kernel in place of XLA's ten.

Algorithm: one program a row, one lane for each listed block and each slot. A listed
block finds its slot in the page table, and a running count numbers the misses. One pass
over the stamps chooses as many victims as there are misses: the age that separates them
is found by halving (a count over the lanes each time), and a running count stores them
one behind the other. Those few are then put in order by comparing each with each. What
lanes learn of each other goes through memory, behind a barrier. Tables are changed in
place, and only where they change. Each miss is stored where the fetch expects it, at
number * R + r, and -1 in the places behind the last of them. What concerns all rows
(bound and counts) is left to a reduction of a few numbers.

Measured on one H200 (jax 0.11.2, durations in a profile, spread at most 0.7 %), with
lists of 96 blocks, a tenth of them missing, the reduction included: 96 slots 9.8 / 10.0
/ 10.2 / 10.2 us for 8 / 16 / 32 / 64 rows (XLA 23.4 / 25.4 / 26.0 / 27.6); 64 rows of
192 / 384 / 1,024 / 1,536 slots 10.5 / 10.9 / 12.4 / 16.2 us (XLA 29.0 / 30.8 / 34.6 /
41.5), the second and third with 8 warps. What grows with the slots is 2 us from 96 to
1,024.

What bounds it is no pass over the slots: 1,024 slots take 12.7 to 14.0 us with 4 to 16
warps where 96 take 11.0 to 12.8 (one H200 beside other work), and neither several ages
counted in a pass (two to sixteen: 12.7 to 15.2 us) nor victims compared sixteen at a
time changes that. Most of it is two launches and a chain of dependent reads.

Tried before there was a page table and not kept: comparing every block with every slot
and every slot's age with every other's, in loops over memory (9.8 and 10.1 us for 16
and 64 rows of 96 slots, but it grew with the square of the slots) or as matrices in
registers (118 us for 16 rows).

Limits: at most 4,096 slots. The back end is deprecated in JAX; this file can be deleted
with it, which leaves XLA's form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Int

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels._common.triton import WarpsConfig, launch, next_power_of_two
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.plan_slots.operands import Slots
from pallas_kernels.plan_slots.plan import SlotPlan

LAST = 2**31 - 1
MOST_SLOTS = 4096


@dataclass(frozen=True)
class Config(WarpsConfig):
    """Settings of the kernel."""


def default_config(capacity: int) -> Config:
    """Warps for as many slots, where the device has no record of the call's sizes."""
    return Config(num_warps=8 if capacity > 256 else 4)


def _load(ref, row, count: int, other: int) -> Int[Array, " width"]:
    """A row of ``count`` numbers, padded to a power of two."""
    lane = jnp.arange(next_power_of_two(count))
    at = ref.at[row * count + jnp.minimum(lane, count - 1)]
    return plt.load(at, mask=lane < count, other=other)


def _store(
    ref,
    size: int,
    place: Int[Array, " width"],
    value: Int[Array, " width"],
    mask: Bool[Array, " width"],
) -> None:
    """Stores where ``mask`` holds; each other lane names a place of its own."""
    lane = jnp.arange(place.shape[0])
    plt.store(ref.at[jnp.where(mask, place, size + lane)], value, mask=mask)


def _kernel(
    blocks_ref,  # [R C]
    last_used_ref,  # [R C]
    page_table_ref,  # [R M]
    listed_ref,  # [R P]
    step_ref,  # [R]
    tail_block_ref,  # [R]
    source_ref,  # [1]
    target_ref,  # [1]
    slots_ref,  # [R P]
    new_blocks_ref,  # [R C], in the place of blocks, like the next two
    new_last_used_ref,  # [R C]
    new_page_table_ref,  # [R M]
    sources_ref,  # [P R]
    targets_ref,  # [P R]
    victims_ref,  # [R P]: scratch
    ages_ref,  # [R P]: scratch
    ordered_ref,  # [R P]: scratch
    counts_ref,  # [3, R]: the row's part of bound, fetched and hits
    *,
    rows: int,
    capacity: int,
    budget: int,
    row_blocks: int,
    barrier: Callable[[], None],
):
    row = pl.program_id(0)
    slots, entries, blocks = rows * capacity, rows * budget, rows * row_blocks
    in_slots, in_entries = row * capacity, row * budget
    listed = _load(listed_ref, row, budget, -1)
    entry = jnp.arange(listed.shape[0])
    asked = listed >= 0
    page = row * row_blocks + jnp.maximum(listed, 0)
    held = plt.load(page_table_ref.at[page], mask=asked, other=-1)
    hit = asked & (held >= 0)
    missing = asked & (held < 0)
    number = jnp.cumsum(missing.astype(jnp.int32)) - 1
    count = missing.astype(jnp.int32).sum()

    # What the list asks for is nobody's victim.
    last = jnp.full(listed.shape, LAST, jnp.int32)
    _store(new_last_used_ref, slots, in_slots + held, last, hit)
    barrier()
    age = _load(new_last_used_ref, row, capacity, LAST)
    empty = _load(blocks_ref, row, capacity, 0) < 0
    slot = jnp.arange(age.shape[0])
    is_slot = slot < capacity
    age = jnp.where(empty & is_slot, -2, age)
    _collect_victims(
        age, count, victims_ref, ages_ref, in_entries, entries, slot < capacity
    )
    barrier()

    # Of the few that were collected, by slot, the oldest is the first.
    collected = entry < count
    lane = in_entries + jnp.minimum(entry, budget - 1)
    own = plt.load(ages_ref.at[lane], mask=collected, other=LAST)
    victim = plt.load(victims_ref.at[lane], mask=collected, other=0)

    def overtake(i, rank):
        other = ages_ref[in_entries + i]
        before = (other < own) | ((other == own) & (i < entry))
        return rank + before.astype(jnp.int32)

    rank = lax.fori_loop(0, count, overtake, jnp.zeros(entry.shape, jnp.int32))
    _store(ordered_ref, entries, in_entries + rank, victim, collected)
    barrier()
    nth = in_entries + jnp.where(missing, number, 0)
    taken = plt.load(ordered_ref.at[nth], mask=missing, other=0)
    place = jnp.where(missing, taken, held)
    evicted = plt.load(blocks_ref.at[in_slots + taken], mask=missing, other=-1)
    barrier()

    _store(slots_ref, entries, in_entries + entry, place, entry < budget)
    _store(new_blocks_ref, slots, in_slots + place, listed, missing)
    step = jnp.full(listed.shape, step_ref[row])
    _store(new_last_used_ref, slots, in_slots + place, step, asked)
    nothing = jnp.full(entry.shape, -1, jnp.int32)
    gone = missing & (evicted >= 0)
    _store(new_page_table_ref, blocks, row * row_blocks + evicted, nothing, gone)
    _store(new_page_table_ref, blocks, page, place, missing)

    # No two of these stores name one place: misses are numbered from 0 without a gap.
    come = missing & (listed < tail_block_ref[row])
    for ref, value in (
        (sources_ref, source_ref[0] + row * row_blocks + listed),
        (targets_ref, target_ref[0] + row * capacity + place),
    ):
        rest = (entry < budget) & (entry >= count)
        _store(ref, entries, entry * rows + row, nothing, rest)
        value = jnp.where(come, value, -1)
        _store(ref, entries, number * rows + row, value, missing)
    counts_ref[0, row] = rows * (1 + jnp.where(come, number, -1).max())
    counts_ref[1, row] = come.astype(jnp.int32).sum()
    counts_ref[2, row] = hit.astype(jnp.int32).sum()


def _collect_victims(
    age: Int[Array, " width"],
    count: Int[Array, ""],
    victims_ref,
    ages_ref,
    first,
    size: int,
    is_slot: Bool[Array, " width"],
) -> None:
    """Stores the `count` oldest slots and their ages, by slot.

    Args:
      age: of each slot; `LAST` for those that stay.
      count: how many to store, at most as many as do not stay.
      victims_ref, ages_ref: where to, from `first` on; of `size` numbers.
      first: the row's first place there.
      size: of the two.
      is_slot: false for lanes behind the last slot.
    """
    oldest = age.min()
    newest = jnp.where(age == LAST, oldest, age).max()
    newest = jnp.where(count > 0, newest, oldest)

    # The least age that as many as needed do not exceed.
    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (age <= middle).astype(jnp.int32).sum() >= count
        return (
            jnp.where(enough, low, middle + 1),
            jnp.where(enough, middle, high),
        )

    limit, _ = lax.while_loop(lambda b: b[0] < b[1], halve, (oldest, newest))
    below, tied = age < limit, (age == limit) & is_slot
    rest = count - below.astype(jnp.int32).sum()
    # Two running counts in one: there are fewer slots than 2^15.
    both = jnp.cumsum(below.astype(jnp.int32) + (tied.astype(jnp.int32) << 16))
    ties = both >> 16
    chosen = below | (tied & (ties <= rest))
    at = first + (both & 0xFFFF) + jnp.minimum(ties, rest) - 1
    _store(victims_ref, size, at, jnp.arange(age.shape[0]), chosen)
    _store(ages_ref, size, at, age, chosen)


@in_32_bit
def plan_slots_triton(
    operands: Slots, *, config: Config | None = None, interpret: bool = False
) -> SlotPlan:
    """Computes the result.

    Args:
      operands: tables and lists.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The plan.

    Raises:
      NotImplementedError: for too many slots, or without a CUDA device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    capacity, budget = operands.capacity, operands.budget
    rows, row_blocks = operands.rows, operands.row_blocks
    if capacity > MOST_SLOTS:
        raise NotImplementedError(
            f"triton plans at most {MOST_SLOTS} slots of a row, not {capacity}"
        )
    if config is None:
        sizes = {"R": rows, "C": capacity, "P": budget}
        found = tuned_config("plan_slots", "triton", sizes)
        config = Config(**found) if found else default_config(capacity)
    entries, of_slots = rows * budget, rows * capacity
    sizes = [entries, of_slots, of_slots, rows * row_blocks, *[entries] * 5]
    # The interpreter also stores what is masked: behind the end, and back.
    spare = next_power_of_two(capacity) if interpret else 0
    flat = [x.reshape(-1) for x in jax.tree.leaves(operands)]
    *flat, counts = launch(
        functools.partial(
            _kernel,
            rows=rows,
            capacity=capacity,
            budget=budget,
            row_blocks=row_blocks,
            barrier=(lambda: None) if interpret else plt.debug_barrier,
        ),
        *(jnp.pad(table, (0, spare)) for table in flat[:3]),
        *flat[3:],
        grid=(rows,),
        out_shape=[
            *(jax.ShapeDtypeStruct((size + spare,), jnp.int32) for size in sizes),
            jax.ShapeDtypeStruct((3, rows), jnp.int32),
        ],
        config=config,
        interpret=interpret,
        name="plan_slots_triton",
        aliases={0: 1, 1: 2, 2: 3},
    )
    flat = [x[:size] for x, size in zip(flat, sizes, strict=True)]
    slots, blocks, last_used, page_table, sources, targets, *_ = flat
    return SlotPlan(
        slots,
        blocks,
        last_used,
        page_table,
        sources,
        targets,
        bound=jnp.max(counts[0]),
        fetched=jnp.sum(counts[1]),
        hits=jnp.sum(counts[2]),
    ).of_rows(operands.lead)
