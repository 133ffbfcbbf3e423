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
      rows: shape of the rows.
      blocks: scores of a row (M).
      budget: how many are listed (P).
      values: scores are drawn from so many different ones; 0 for no limit.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    rows: tuple[int, ...]
    blocks: int
    budget: int
    values: int = 0
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``choose_blocks``: some blocks are forced, some
        out, and a row's own block is anywhere."""
        rng = np.random.default_rng(seed)
        shape = (*self.rows, self.blocks)
        scores = rng.standard_normal(shape, dtype=np.float32)
        if self.values:
            scores = np.trunc(scores * self.values / 2)
        kind = rng.random(shape)
        scores = np.where(kind < 0.1, np.inf, np.where(kind > 0.8, -np.inf, scores))
        own = rng.integers(0, self.blocks, self.rows)
        return {
            "scores": jnp.asarray(scores, jnp.float32),
            "own": jnp.asarray(own, jnp.int32),
            "budget": self.budget,
        }


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("decode", (2, 2, 1), 200, 24),
    ArgSpec("ties", (1, 2, 8), 65, 16, values=4),
    ArgSpec("power_of_two", (4,), 64, 8),
    ArgSpec("more_than_there_are", (3, 2), 7, 12),
    ArgSpec("one", (1,), 1, 1),
    ArgSpec("long", (1, 2, 1), 2053, 96, values=100),
    ArgSpec("large", (16,), 16384, 96, tags=frozenset({"large"})),
)
