"""The plan in XLA: comparison matrices of [P, C], [C, C] and [P, P] per row.

A few small fused kernels on a GPU: no sort, no loop, and one scatter.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels._common.dispatch import in_32_bit
from pallas_kernels.plan_fetch.reference import FetchPlan


def _running_count(marked: Bool[Array, "N P"]) -> Int[Array, "N P"]:
    """How many entries up to and including each one are marked.

    For rows as short as a block list one fused kernel, where XLA's cumulative sum on a
    GPU is several times slower.
    """
    place = jnp.arange(marked.shape[-1])
    upto = place[None, :] <= place[:, None]
    return jnp.sum(marked[..., None, :] & upto, axis=-1, dtype=jnp.int32)


def _before(counts: Int[Array, " N"]) -> Int[Array, " N"]:
    """Sum of the counts before each one."""
    place = jnp.arange(counts.shape[0])
    earlier = place[None, :] < place[:, None]
    return jnp.sum(jnp.where(earlier, counts, 0), axis=-1, dtype=jnp.int32)


@in_32_bit
def plan_fetch_xla(
    listed: Int[Array, "N P"],
    held: Int[Array, "N C"],
    used: Int[Array, "N C"],
    stamp: Int[Array, " N"],
    limit: Int[Array, " N"],
    base: Int[Array, " N"],
) -> FetchPlan:
    """The plan; arguments as those of ``plan_fetch``. Nothing is checked here."""
    asked = listed >= 0
    holds = (listed[:, :, None] == held[:, None, :]) & asked[..., None]
    hit = jnp.any(holds, axis=2)
    missing = asked & ~hit
    kept = jnp.any(holds, axis=1)

    # The n-th miss takes the n-th victim. A slot's turn is how many others go before
    # it; kept slots go last.
    age = jnp.where(kept, jnp.iinfo(jnp.int32).max, used)
    age = jnp.where((held < 0) & ~kept, -2, age)
    slot = jnp.arange(age.shape[1], dtype=jnp.int32)
    older = age[:, None, :] < age[:, :, None]
    tied = age[:, None, :] == age[:, :, None]
    first = older | (tied & (slot[None, :] < slot[:, None]))
    turn = jnp.sum(first, axis=2, dtype=jnp.int32)
    number = _running_count(missing) - 1
    takes = (number[:, :, None] == turn[:, None, :]) & missing[..., None]

    placed = jnp.argmax(holds | takes, axis=2).astype(jnp.int32)
    slots = jnp.where(asked, placed, -1)
    incoming = jnp.max(jnp.where(takes, listed[:, :, None], -1), axis=1)
    taken = incoming >= 0

    come = missing & (listed < limit[:, None])
    within = _running_count(come)
    where = _before(within[:, -1])[:, None] + within - 1
    where = jnp.where(come, where, listed.size).reshape(-1)
    index = jnp.arange(listed.shape[0], dtype=jnp.int32)[:, None]
    rows, places = base[:, None] + listed, index * held.shape[1] + slots
    both = jnp.stack((rows.reshape(-1), places.reshape(-1)), axis=-1)
    packed = jnp.full((listed.size, 2), -1, jnp.int32)
    packed = packed.at[where].set(both, mode="drop", unique_indices=True)
    return FetchPlan(
        slots=slots,
        blocks=jnp.where(taken, incoming, held),
        used=jnp.where(kept | taken, stamp[:, None], used),
        rows=packed[:, 0],
        places=packed[:, 1],
        count=jnp.sum(come, dtype=jnp.int32),
        hits=jnp.sum(hit, dtype=jnp.int32),
    )
