"""Named arguments shared by tests, benchmarks and the tuner."""

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
      batch, kv_heads, length, head_dim: sizes (B, K, S, H).
      size: keys of a window.
      stride: keys from one window's start to the next.
      tags: "ci" runs everywhere, "large" only in benchmarks.
    """

    name: str
    batch: int
    kv_heads: int
    length: int
    head_dim: int
    size: int = 32
    stride: int = 16
    tags: frozenset[str] = field(default=frozenset({"ci"}))

    def make(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
        """Draws keyword arguments of ``compress_keys`` for these sizes."""
        shape = (self.batch, self.kv_heads, self.length, self.head_dim)
        rng = np.random.default_rng(seed)
        return {
            "keys": jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype),
            "kernel_size": self.size,
            "kernel_stride": self.stride,
        }


ARG_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec("minicpm", 2, 2, 150, 128),
    ArgSpec("one_window", 1, 2, 32, 64),
    ArgSpec("too_short", 1, 1, 31, 64),
    ArgSpec("tail", 2, 1, 1215, 64),
    ArgSpec("no_overlap", 1, 2, 100, 64, 16, 16),
    ArgSpec("four_strides", 1, 3, 200, 64, 64, 16),
    ArgSpec("small_windows", 1, 3, 130, 64, 8, 4),
    ArgSpec("pairs", 1, 1, 9, 64, 2, 1),
    ArgSpec("head_dim_256", 1, 2, 70, 256),
    ArgSpec("minicpm_128k", 1, 2, 131072, 128, tags=frozenset({"large"})),
    ArgSpec("minicpm_b8_128k", 8, 2, 131072, 128, tags=frozenset({"large"})),
)
