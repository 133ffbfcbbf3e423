"""Named arguments shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.choose_blocks.forced import Forced


@dataclass(frozen=True)
class ArgSpec:
    """Sizes of a call.

    Attributes:
      name: short, unique, used as a test's id.
      rows: shape of the rows.
      blocks: scores of a row (M).
      budget: how many are listed (P).
      values: scores are drawn from so many different ones; 0 for no limit.
      forced: blocks taken or left out; scores then hold NaN, and +inf means nothing.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    rows: tuple[int, ...]
    blocks: int
    budget: int
    values: int = 0
    forced: Forced | None = None
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``choose_blocks``: some blocks have +inf, some
        -inf, and a row's own block is anywhere."""
        rng = np.random.default_rng(seed)
        shape = (*self.rows, self.blocks)
        scores = rng.standard_normal(shape, dtype=np.float32)
        if self.values:
            scores = np.trunc(scores * self.values / 2)
        kind = rng.random(shape)
        scores = np.where(kind < 0.1, np.inf, np.where(kind > 0.8, -np.inf, scores))
        own = rng.integers(0, self.blocks, self.rows)
        more = {}
        if self.forced is not None:
            scores = np.where(rng.random(shape) < 0.05, np.nan, scores)
            more = {"forced": self.forced}
        return more | {
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
    ArgSpec("forced", (2, 12), 1100, 24, forced=Forced(1, 5)),
    ArgSpec("forced_literal", (2, 6), 70, 24, 8, Forced(3, 2, mask_future=False)),
    ArgSpec("large", (16,), 16384, 96, tags=frozenset({"large"})),
)
