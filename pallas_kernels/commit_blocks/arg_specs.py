"""Named arguments shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._common.copy_specs import CopySpec


@dataclass(frozen=True)
class ArgSpec(CopySpec):
    """Sizes of a call: rows are slots, of which no one is listed twice.

    Attributes:
      int8: staged blocks are in 8 bits.
    """

    int8: bool = field(default=False, kw_only=True)

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``commit_blocks``; skipped blocks are NaN."""
        rng = np.random.default_rng(seed)
        slots = rng.standard_normal((self.rows, *self.block), dtype=np.float32)
        staged = rng.standard_normal((self.count, *self.block), dtype=np.float32)
        indices = rng.permutation(self.rows)[: self.count].astype(np.int32)
        indices[rng.random(self.count) < self.skipped] = -1
        staged[indices < 0] = np.nan
        if self.int8:
            return self._in_int8(jnp.asarray(slots, dtype), indices, rng)
        return {
            "slots": jnp.asarray(slots, dtype),
            "staged": jnp.asarray(staged, dtype),
            "indices": jnp.asarray(indices),
        }

    def _in_int8(
        self, slots: Any, indices: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Any]:
        """The same with stored blocks; scales of skipped ones are NaN."""
        tokens, _, dim = self.block
        whole = rng.integers(-127, 128, (self.count, *self.block)).astype(np.int8)
        size = -(-(tokens + dim) // 256) * 256
        scales = rng.uniform(1e-3, 0.1, (self.count, size)).astype(np.float32)
        scales[:, tokens + dim :] = np.nan
        scales[indices < 0] = np.nan
        return {
            "slots": slots,
            "staged": jnp.asarray(whole),
            "indices": jnp.asarray(indices),
            "scales": jnp.asarray(scales),
        }


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("blocks", 24, (64, 2, 128), 10),
    ArgSpec("skips", 48, (16, 2, 64), 33, skipped=0.4),
    ArgSpec("one", 1, (32, 2, 64), 1),
    ArgSpec("all_skipped", 5, (16, 2, 64), 4, skipped=1.0),
    ArgSpec("odd_rows", 9, (48, 2, 64), 7),
    ArgSpec("int8", 24, (64, 2, 128), 10, 0.3, int8=True),
    ArgSpec("int8_odd_heads", 7, (16, 2, 96), 5, 0.2, int8=True),
    ArgSpec("large", 4096, (64, 2, 128), 3072, 0.9, tags=frozenset({"large"})),
)
