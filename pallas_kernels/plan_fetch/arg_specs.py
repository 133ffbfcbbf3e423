"""Named arguments shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call.

    Attributes:
      name: short, unique, used as a test's id.
      rows: N, sequences times kv heads.
      width: P, listed blocks of a row.
      slots: C, slots of a row.
      blocks: M, blocks that exist; a list draws from them.
      miss: share of listed blocks that no slot holds.
      empty: share of slots that hold nothing.
      padding: share of list entries that are −1.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    rows: int
    width: int
    slots: int
    blocks: int
    miss: float = 0.2
    empty: float = 0.0
    padding: float = 0.0
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``plan_fetch``."""
        rng = np.random.default_rng(seed)
        listed = np.full((self.rows, self.width), -1, np.int32)
        held = np.full((self.rows, self.slots), -1, np.int32)
        used = np.full((self.rows, self.slots), -1, np.int32)
        for n in range(self.rows):
            held[n] = rng.permutation(self.blocks)[: self.slots]
            absent = np.setdiff1d(np.arange(self.blocks), held[n])
            listed[n] = rng.permutation(held[n])[: self.width]
            new = np.flatnonzero(rng.random(self.width) < self.miss)[: len(absent)]
            listed[n, new] = rng.permutation(absent)[: len(new)]
            # Few different stamps, so that ties are met.
            used[n] = rng.integers(0, 5, self.slots)
        nothing = rng.random(held.shape) < self.empty
        held[nothing], used[nothing] = -1, -1
        listed[rng.random(listed.shape) < self.padding] = -1
        limit = rng.integers(self.blocks // 2, self.blocks + 1, self.rows)
        base = np.arange(self.rows) * self.blocks
        stamp = rng.integers(5, 9, self.rows)
        arrays = {
            "listed": listed,
            "held": held,
            "used": used,
            "stamp": stamp,
            "limit": limit,
            "base": base,
        }
        return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("budget", 6, 16, 16, 40),
    ArgSpec("more_slots", 4, 12, 25, 60, padding=0.2),
    ArgSpec("empty_slots", 3, 20, 33, 64, miss=0.5, empty=0.4, padding=0.1),
    ArgSpec("all_new", 5, 7, 9, 40, miss=1.0),
    ArgSpec("nothing_listed", 3, 6, 6, 12, padding=1.0),
    ArgSpec("one", 1, 1, 1, 3, miss=1.0),
    ArgSpec("many_rows", 21, 4, 5, 12, miss=0.5),
    ArgSpec("wide", 2, 96, 192, 512, empty=0.1),
    ArgSpec("large", 32, 96, 96, 2048, 0.1, tags=frozenset({"large"})),
    ArgSpec("large_batch", 256, 96, 96, 2048, 0.1, tags=frozenset({"large"})),
)
