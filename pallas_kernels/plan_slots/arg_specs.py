"""Named arguments shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int


def page_table(
    blocks: Int[np.ndarray, "*rows C"], count: int
) -> Int[np.ndarray, "*rows M"]:
    """The slot of each of ``count`` blocks, -1 for none, by the slots' contents."""
    lead, slots = blocks.shape[:-1], blocks.shape[-1]
    found = np.full((*lead, count + 1), -1)
    slot = np.broadcast_to(np.arange(slots), blocks.shape)
    np.put_along_axis(found, np.where(blocks < 0, count, blocks), slot, axis=-1)
    return found[..., :count]


@dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call.

    Attributes:
      name: short, unique, used as a test's id.
      rows: shape of the rows.
      capacity: slots of a row (C).
      budget: blocks that a row lists (P).
      blocks: blocks there are, at least one more than C.
      misses: share of a list that no slot holds.
      empty: share of the slots that hold nothing.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    rows: tuple[int, ...]
    capacity: int
    budget: int
    blocks: int
    misses: float = 0.3
    empty: float = 0.2
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``plan_slots``: lists are unordered, with padding
        between their blocks, and some end with a block that begins now."""
        rng = np.random.default_rng(seed)
        shape = (*self.rows, self.capacity)
        blocks, listed = np.full(shape, -1), np.full((*self.rows, self.budget), -1)
        for at in np.ndindex(self.rows):
            order = rng.permutation(self.blocks)
            inside = order[: self.capacity]
            blocks[at] = np.where(rng.random(self.capacity) < self.empty, -1, inside)
            held = inside[blocks[at] >= 0]
            news = np.setdiff1d(order, held)
            fresh = rng.binomial(self.budget, self.misses)
            fresh = max(min(fresh, news.size), self.budget - held.size)
            wanted = [*rng.permutation(news)[:fresh]]
            wanted += [*rng.permutation(held)[: self.budget - fresh]]
            kept = rng.random(self.budget) < 0.9
            listed[at] = np.where(kept, rng.permutation(wanted), -1)
        steps = np.where(blocks >= 0, rng.integers(0, 6, shape), -1)
        values = {
            "blocks": blocks,
            "last_used": steps,
            "page_table": page_table(blocks, self.blocks),
            "listed": listed,
            "step": rng.integers(6, 9, self.rows),
            "tail_block": rng.integers(self.blocks // 2, self.blocks, self.rows),
        }
        arrays = {name: jnp.asarray(x, jnp.int32) for name, x in values.items()}
        return arrays | {"source": 7, "target": 3}


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("budget_of_slots", (2, 2), 24, 24, 60),
    ArgSpec("one_slot_more", (3, 1), 25, 24, 60),
    ArgSpec("many_slots", (2,), 70, 12, 90, misses=0.6),
    ArgSpec("all_miss", (2, 3), 16, 8, 64, misses=1.0, empty=0.5),
    ArgSpec("all_hit", (4,), 16, 8, 64, misses=0.0, empty=0.0),
    ArgSpec("one", (1,), 1, 1, 2),
    ArgSpec("decode", (16, 2), 96, 96, 512, misses=0.1, empty=0.0),
    ArgSpec("wide", (64, 2), 128, 96, 2048, misses=0.1, tags=frozenset({"large"})),
    ArgSpec("most", (64, 2), 1024, 96, 2048, misses=0.1, tags=frozenset({"large"})),
    ArgSpec("uneven", (8, 2), 1500, 96, 2048, misses=0.5, tags=frozenset({"large"})),
)
