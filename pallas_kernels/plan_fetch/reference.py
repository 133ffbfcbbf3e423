"""The definition of the plan: a few sorts per row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels._common.dispatch import in_32_bit


class FetchPlan(NamedTuple):
    """What block lists mean for the slots, and what must be fetched.

    Attributes:
      slots: where each listed block lies, or will [N, P]; −1 for padding.
      blocks: the block in each slot once all are in [N, C]; −1 for none.
      used: stamp of the last list that asked for each slot's block [N, C].
      rows: host rows to fetch, those of row 0's list first; the entries from
        ``count`` on are undefined [N*P].
      places: the slot that each of them goes to, n * C + slot; likewise [N*P].
      count: how many must be fetched.
      hits: how many listed blocks lie in a slot already.
    """

    slots: Int[Array, "N P"]
    blocks: Int[Array, "N C"]
    used: Int[Array, "N C"]
    rows: Int[Array, " J"]
    places: Int[Array, " J"]
    count: Int[Array, ""]
    hits: Int[Array, ""]


def _one_row(listed: Array, held: Array, used: Array, stamp: Array) -> tuple:
    """One row: its slots, its table, and which listed blocks are missing."""
    asked = listed >= 0
    hit = asked & jnp.isin(listed, held)
    missing = asked & ~hit
    kept = jnp.isin(held, jnp.where(asked, listed, -2))
    # Empty slots first, then by the oldest stamp, ties by index; kept ones never.
    victims = jnp.lexsort((used, held >= 0, kept))
    victim = victims[jnp.clip(jnp.cumsum(missing) - 1, 0, held.shape[0] - 1)]
    found = jnp.argmax(held[None] == listed[:, None], axis=1)
    slots = jnp.where(hit, found, jnp.where(missing, victim, -1))
    there = jnp.where(asked, slots, held.shape[0])
    blocks = held.at[there].set(listed, mode="drop")
    used = used.at[there].set(stamp, mode="drop")
    return slots, blocks, used, missing


@in_32_bit
def plan_fetch_reference(
    listed: Int[Array, "N P"],
    held: Int[Array, "N C"],
    used: Int[Array, "N C"],
    stamp: Int[Array, " N"],
    limit: Int[Array, " N"],
    base: Int[Array, " N"],
) -> FetchPlan:
    """The plan; arguments as those of ``plan_fetch``."""
    slots, blocks, stamps, missing = jax.vmap(_one_row)(listed, held, used, stamp)
    come = missing & (listed < limit[:, None])
    first = jnp.argsort(~come.reshape(-1), stable=True)
    number = jnp.arange(listed.shape[0], dtype=jnp.int32)[:, None]
    return FetchPlan(
        slots=slots.astype(jnp.int32),
        blocks=blocks,
        used=stamps,
        rows=(base[:, None] + listed).reshape(-1)[first],
        places=(number * held.shape[1] + slots).reshape(-1)[first].astype(jnp.int32),
        count=jnp.sum(come, dtype=jnp.int32),
        hits=jnp.sum((listed >= 0) & ~missing, dtype=jnp.int32),
    )
