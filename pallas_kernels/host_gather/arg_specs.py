"""Named arguments shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._common.copy_specs import CopySpec


@dataclass(frozen=True)
class ArgSpec(CopySpec):
    """Sizes of a call: rows are blocks in host memory."""

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``host_gather``, in device memory."""
        rng = np.random.default_rng(seed)
        blocks = rng.standard_normal((self.rows, *self.block), dtype=np.float32)
        indices = rng.integers(0, self.rows, self.count).astype(np.int32)
        indices[rng.random(self.count) < self.skipped] = -1
        return {"blocks": jnp.asarray(blocks, dtype), "indices": jnp.asarray(indices)}


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("blocks", 24, (64, 2, 128), 10),
    ArgSpec("skips", 24, (16, 2, 64), 33, skipped=0.4),
    ArgSpec("one", 1, (32, 2, 64), 1),
    ArgSpec("all_skipped", 5, (16, 2, 64), 4, skipped=1.0),
    ArgSpec("odd_rows", 7, (48, 2, 64), 9),
    ArgSpec("large", 8192, (64, 2, 128), 1536, tags=frozenset({"large"})),
)
