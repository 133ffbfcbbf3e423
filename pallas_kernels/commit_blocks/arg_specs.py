"""Named arguments shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._common.copy_specs import CopySpec


@dataclass(frozen=True)
class ArgSpec(CopySpec):
    """Sizes of a call: rows are slots, of which no one is listed twice."""

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``commit_blocks``; skipped blocks are NaN."""
        rng = np.random.default_rng(seed)
        slots = rng.standard_normal((self.rows, *self.block), dtype=np.float32)
        staged = rng.standard_normal((self.count, *self.block), dtype=np.float32)
        indices = rng.permutation(self.rows)[: self.count].astype(np.int32)
        indices[rng.random(self.count) < self.skipped] = -1
        staged[indices < 0] = np.nan
        return {
            "slots": jnp.asarray(slots, dtype),
            "staged": jnp.asarray(staged, dtype),
            "indices": jnp.asarray(indices),
        }


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("blocks", 24, (64, 2, 128), 10),
    ArgSpec("skips", 48, (16, 2, 64), 33, skipped=0.4),
    ArgSpec("one", 1, (32, 2, 64), 1),
    ArgSpec("all_skipped", 5, (16, 2, 64), 4, skipped=1.0),
    ArgSpec("odd_rows", 9, (48, 2, 64), 7),
    ArgSpec("large", 4096, (64, 2, 128), 3072, 0.9, tags=frozenset({"large"})),
)
