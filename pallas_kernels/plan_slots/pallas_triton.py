"""The plan on Triton: one kernel in place of XLA's ten.

Algorithm: one program a row, one lane for each listed block and each slot. Two loops
compare them with what lies in memory, a number at a time: every block with every slot,
then every slot's age with every other's, which gives the slot its rank as a victim. A
running count numbers the misses. Victims and misses meet in memory: both are stored by
their number and read by each other's, behind a barrier. Each miss is stored where the
fetch expects it, at number * R + r, and -1 in the places behind the last of them. What
concerns all rows (bound and counts) is left to a reduction of a few numbers.

Measured on one H100 (jax 0.11.2, durations in a profile, spread at most 0.4 %), lists
of 96 blocks, a tenth of them missing, 96 slots, with the reduction: 9.9 / 10.1 / 10.3 /
10.4 us for 8 / 16 / 32 / 64 rows; XLA 20.5 / 21.7 / 23.1 / 26.2. In a decode step of 32
layers at batch 16: 10.31 ms with XLA's, 9.99 with this one, 9.87 once it writes the
table in place.

Tried and not kept: 4, 8 or 16 numbers a turn of the loops (0.4 us less: the loops are
not what it waits for), and the comparisons as matrices in registers, as in the XLA form
(118 us for 16 rows).

Limits: at most 1,024 slots. The back end is deprecated in JAX; this file can be deleted
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
from pallas_kernels._common.triton import WarpsConfig, next_power_of_two
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.lowering import silence_triton_deprecation
from pallas_kernels.plan_slots.plan import SlotPlan

LAST = 2**31 - 1
MOST_SLOTS = 1024


@dataclass(frozen=True)
class Config(WarpsConfig):
    """Settings of the kernel."""


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
    listed_ref,  # [R P]
    step_ref,  # [R]
    tail_block_ref,  # [R]
    source_ref,  # [1]
    target_ref,  # [1]
    slots_ref,  # [R P]
    new_blocks_ref,  # [R C]
    new_last_used_ref,  # [R C]
    sources_ref,  # [P R]
    targets_ref,  # [P R]
    ages_ref,  # [R C]: scratch
    victims_ref,  # [R C]: scratch
    misses_ref,  # [R P]: scratch
    counts_ref,  # [3, R]: the row's part of bound, fetched and hits
    *,
    rows: int,
    capacity: int,
    budget: int,
    row_blocks: int,
    barrier: Callable[[], None],
):
    row = pl.program_id(0)
    blocks = _load(blocks_ref, row, capacity, -1)
    last_used = _load(last_used_ref, row, capacity, LAST)
    listed = _load(listed_ref, row, budget, -1)
    slot, entry = jnp.arange(blocks.shape[0]), jnp.arange(listed.shape[0])
    is_slot, is_entry = slot < capacity, entry < budget
    in_row = row * capacity + slot

    def compare(i, found):
        held, kept = found
        block = blocks_ref[row * capacity + i]
        held = jnp.where((listed == block) & (block >= 0), i, held)
        # The list is at most as long as there are slots.
        asked = listed_ref[row * budget + jnp.minimum(i, budget - 1)]
        return held, kept | ((blocks == asked) & (asked >= 0)).astype(jnp.int32)

    found = (jnp.full(entry.shape, -1, jnp.int32), jnp.zeros(slot.shape, jnp.int32))
    held, kept = lax.fori_loop(0, capacity, compare, found)
    kept = kept > 0
    missing = (listed >= 0) & (held < 0)
    number = jnp.cumsum(missing.astype(jnp.int32)) - 1
    count = missing.astype(jnp.int32).sum()

    # The n-th miss takes the n-th victim: empty slots first, kept ones last.
    age = jnp.where(blocks < 0, -2, last_used)
    age = jnp.where(kept, LAST, age)
    _store(ages_ref, rows * capacity, in_row, age, is_slot)
    barrier()

    def overtake(i, rank):
        other = ages_ref[row * capacity + i]
        before = (other < age) | ((other == age) & (i < slot))
        return rank + before.astype(jnp.int32)

    rank = lax.fori_loop(0, capacity, overtake, jnp.zeros(slot.shape, jnp.int32))
    _store(victims_ref, rows * capacity, row * capacity + rank, slot, is_slot)
    _store(misses_ref, rows * budget, row * budget + number, listed, missing)
    barrier()
    taken = is_slot & (rank < count)
    victim = row * capacity + jnp.where(missing, number, 0)
    place = jnp.where(missing, plt.load(victims_ref.at[victim]), held)
    miss = row * budget + jnp.where(taken, rank, 0)
    incoming = plt.load(misses_ref.at[miss], mask=taken, other=-1)

    _store(slots_ref, rows * budget, row * budget + entry, place, is_entry)
    after = jnp.where(taken, incoming, blocks)
    _store(new_blocks_ref, rows * capacity, in_row, after, is_slot)
    after = jnp.where(kept | taken, step_ref[row], last_used)
    _store(new_last_used_ref, rows * capacity, in_row, after, is_slot)

    # No two of these stores name one place: misses are numbered from 0 without a gap.
    come = missing & (listed < tail_block_ref[row])
    nothing = jnp.full(entry.shape, -1, jnp.int32)
    for ref, value in (
        (sources_ref, source_ref[0] + row * row_blocks + listed),
        (targets_ref, target_ref[0] + row * capacity + place),
    ):
        rest = is_entry & (entry >= count)
        _store(ref, budget * rows, entry * rows + row, nothing, rest)
        value = jnp.where(come, value, -1)
        _store(ref, budget * rows, number * rows + row, value, missing)
    counts_ref[0, row] = rows * (1 + jnp.where(come, number, -1).max())
    counts_ref[1, row] = come.astype(jnp.int32).sum()
    counts_ref[2, row] = ((listed >= 0) & ~missing).astype(jnp.int32).sum()


@in_32_bit
def plan_slots_triton(
    blocks: Int[Array, "*rows C"],
    last_used: Int[Array, "*rows C"],
    listed: Int[Array, "*rows P"],
    step: Int[Array, "*rows"],
    tail_block: Int[Array, "*rows"],
    source: Int[Array, ""],
    target: Int[Array, ""],
    *,
    row_blocks: int,
    config: Config | None = None,
    interpret: bool = False,
) -> SlotPlan:
    """Computes the result.

    Args:
      blocks: as in the operation, like the following ones.
      last_used: of the slots' blocks.
      listed: lists.
      step: of the lists.
      tail_block: of the rows.
      source: where blocks begin.
      target: where slots begin.
      row_blocks: of each row.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The plan.

    Raises:
      NotImplementedError: for too many slots, or without a CUDA device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    lead, capacity = blocks.shape[:-1], blocks.shape[-1]
    budget = listed.shape[-1]
    if capacity > MOST_SLOTS:
        raise NotImplementedError(
            f"triton plans at most {MOST_SLOTS} slots of a row, not {capacity}"
        )
    rows = blocks.size // capacity
    config = config or Config(
        **tuned_config("plan_slots", "triton", {"R": rows, "C": capacity, "P": budget})
    )
    slots, entries = rows * capacity, rows * budget
    sizes = [entries, slots, slots, entries, entries, slots, slots, entries]
    # The interpreter also stores what is masked: behind the end, and back.
    spare = next_power_of_two(capacity) if interpret else 0
    silence_triton_deprecation()
    *flat, counts = pl.pallas_call(
        functools.partial(
            _kernel,
            rows=rows,
            capacity=capacity,
            budget=budget,
            row_blocks=row_blocks,
            barrier=(lambda: None) if interpret else plt.debug_barrier,
        ),
        grid=(rows,),
        out_shape=[
            *(jax.ShapeDtypeStruct((size + spare,), jnp.int32) for size in sizes),
            jax.ShapeDtypeStruct((3, rows), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        # A row's program has read its slots when it writes them.
        input_output_aliases={} if interpret else {0: 1, 1: 2},
        interpret=interpret,
        name="plan_slots_triton",
    )(
        *(
            x.reshape(-1)
            for x in (blocks, last_used, listed, step, tail_block, source, target)
        )
    )
    flat = [x[:size] for x, size in zip(flat, sizes, strict=True)]
    return SlotPlan(
        slots=flat[0].reshape(*lead, budget),
        blocks=flat[1].reshape(*lead, capacity),
        last_used=flat[2].reshape(*lead, capacity),
        sources=flat[3],
        targets=flat[4],
        bound=jnp.max(counts[0]),
        fetched=jnp.sum(counts[1]),
        hits=jnp.sum(counts[2]),
    )
