"""The plan on Triton: two small kernels where XLA has about ten.

Algorithm: in the first kernel one program plans one row with the comparison matrices of
the XLA form in registers, and packs its own misses. In the second, one program a row
adds up the counts of the rows before and copies the row's misses behind theirs.

What bounds it: latency. A row is a few hundred numbers; what is saved is the start of
eight kernels in every layer of a decode step.

Limits: at most 256 slots a row, so that a [C, C] tile fits into registers, and 4,096
rows. The back end is deprecated in JAX; this file can be deleted with it, which leaves
the XLA form.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

from pallas_kernels._common.dispatch import (
    in_32_bit,
    require_cuda,
    silence_triton_deprecation,
)
from pallas_kernels._common.triton import next_power_of_two
from pallas_kernels.plan_fetch.reference import FetchPlan

MAX_SLOTS = 256
MAX_ROWS = 4096
# No block, no slot: what fills a tile behind the row's end.
NOBODY = -3


def _plan_kernel(
    listed_ref,
    held_ref,
    used_ref,
    stamp_ref,
    limit_ref,
    base_ref,
    slots_ref,
    blocks_ref,
    used_out_ref,
    rows_ref,
    places_ref,
    counts_ref,
    *,
    width: int,
    capacity: int,
    tile: Callable[[int], int],
):
    n = pl.program_id(0)
    entry = jnp.arange(tile(width), dtype=jnp.int32)
    slot = jnp.arange(tile(capacity), dtype=jnp.int32)
    inside, real = entry < width, slot < capacity
    at, of = jnp.minimum(entry, width - 1), jnp.minimum(slot, capacity - 1)
    listed = plt.load(listed_ref.at[n, at], mask=inside, other=-1)
    held = plt.load(held_ref.at[n, of], mask=real, other=NOBODY)
    used = plt.load(used_ref.at[n, of], mask=real, other=0)
    stamp, limit, base = stamp_ref[n], limit_ref[n], base_ref[n]

    asked = listed >= 0
    holds = (listed[:, None] == held[None, :]) & asked[:, None]
    hit = jnp.max(holds.astype(jnp.int32), axis=1) > 0
    kept = jnp.max(holds.astype(jnp.int32), axis=0) > 0
    missing = asked & ~hit

    last = jnp.iinfo(jnp.int32).max
    age = jnp.where(held < 0, -2, used)
    age = jnp.where(kept | ~real, last, age)
    older = age[None, :] < age[:, None]
    tied = (age[None, :] == age[:, None]) & (slot[None, :] < slot[:, None])
    turn = jnp.sum((older | tied).astype(jnp.int32), axis=1)
    upto = entry[None, :] <= entry[:, None]
    number = jnp.sum((upto & missing[None, :]).astype(jnp.int32), axis=1) - 1
    takes = (number[:, None] == turn[None, :]) & missing[:, None]

    place = jnp.max(jnp.where(holds | takes, slot[None, :], -1), axis=1)
    incoming = jnp.max(jnp.where(takes, listed[:, None], -1), axis=0)
    taken = incoming >= 0
    plt.store(slots_ref.at[n, at], place, mask=inside)
    plt.store(blocks_ref.at[n, of], jnp.where(taken, incoming, held), mask=real)
    stamps = jnp.where(kept | taken, stamp, used)
    plt.store(used_out_ref.at[n, of], stamps, mask=real)

    come = missing & (listed < limit)
    within = jnp.sum((upto & come[None, :]).astype(jnp.int32), axis=1)
    count = jnp.sum(come.astype(jnp.int32))
    # Every entry has a place of its own: those that do not come lie behind.
    to = jnp.where(come, within - 1, count + entry - within)
    to = jnp.minimum(to, width - 1)
    plt.store(rows_ref.at[n, to], base + listed, mask=inside)
    plt.store(places_ref.at[n, to], n * capacity + place, mask=inside)
    counts_ref[n, 0] = count
    counts_ref[n, 1] = jnp.sum(hit.astype(jnp.int32))


def _pack_kernel(
    rows_ref,
    places_ref,
    counts_ref,
    rows_out_ref,
    places_out_ref,
    totals_ref,
    *,
    total_rows: int,
    width: int,
    tile: Callable[[int], int],
):
    n = pl.program_id(0)
    row = jnp.arange(tile(total_rows), dtype=jnp.int32)
    there, index = row < total_rows, jnp.minimum(row, total_rows - 1)
    counts = plt.load(counts_ref.at[index, 0], mask=there, other=0)
    before = jnp.sum(jnp.where(row < n, counts, 0))
    own = counts_ref[n, 0]
    entry = jnp.arange(tile(width), dtype=jnp.int32)
    mine, at = entry < own, jnp.minimum(entry, width - 1)
    to = before + entry
    rows = plt.load(rows_ref.at[n, at], mask=mine, other=0)
    places = plt.load(places_ref.at[n, at], mask=mine, other=0)
    plt.store(rows_out_ref.at[to], rows, mask=mine)
    plt.store(places_out_ref.at[to], places, mask=mine)

    @pl.when(n == 0)
    def _():
        hits = plt.load(counts_ref.at[index, 1], mask=there, other=0)
        totals_ref[0] = jnp.sum(counts)
        totals_ref[1] = jnp.sum(hits)


@in_32_bit
def plan_fetch_triton(
    listed: Int[Array, "N P"],
    held: Int[Array, "N C"],
    used: Int[Array, "N C"],
    stamp: Int[Array, " N"],
    limit: Int[Array, " N"],
    base: Int[Array, " N"],
    *,
    interpret: bool = False,
) -> FetchPlan:
    """The plan; arguments as those of ``plan_fetch``.

    Args:
      listed: block lists.
      held: blocks in the slots.
      used: stamps of the slots.
      stamp: time of each list.
      limit: blocks from here on are not fetched.
      base: host row of each row's block 0.
      interpret: run in Pallas's interpreter, on any device.

    Raises:
      NotImplementedError: for more slots or rows than the limits, or without a CUDA
        device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    (count, width), capacity = listed.shape, held.shape[1]
    if capacity > MAX_SLOTS or count > MAX_ROWS:
        raise NotImplementedError(
            f"triton plans at most {MAX_SLOTS} slots in {MAX_ROWS} rows, not "
            f"{capacity} in {count}"
        )

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    # The interpreter writes masked entries back as they were, which must not be the
    # same ones as others that are written: its tiles are exact.
    tile = int if interpret else next_power_of_two
    size = max(tile(width), tile(capacity))
    silence_triton_deprecation()
    slots, blocks, stamps, rows, places, counts = pl.pallas_call(
        lambda *refs: _plan_kernel(*refs, width=width, capacity=capacity, tile=tile),
        grid=(count,),
        out_shape=(
            ints(count, width),
            ints(count, capacity),
            ints(count, capacity),
            ints(count, width),
            ints(count, width),
            ints(count, 2),
        ),
        compiler_params=plt.CompilerParams(
            num_warps=4 if size <= 64 else 8 if size <= 128 else 16, num_stages=1
        ),
        interpret=interpret,
        name="plan_fetch_triton",
    )(listed, held, used, stamp, limit, base)
    packed, goals, totals = pl.pallas_call(
        lambda *refs: _pack_kernel(*refs, total_rows=count, width=width, tile=tile),
        grid=(count,),
        out_shape=(ints(count * width), ints(count * width), ints(2)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="pack_fetch_triton",
    )(rows, places, counts)
    return FetchPlan(slots, blocks, stamps, packed, goals, totals[0], totals[1])
