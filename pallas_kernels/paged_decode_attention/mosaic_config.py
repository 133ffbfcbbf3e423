"""Settings of the Mosaic GPU decode kernel, and which ones a call gets."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels._common.mosaic import SHARED_BYTES, WARPGROUP_ROWS
from pallas_kernels._common.numerics import cdiv
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      splits: thread blocks that share the slots of one (row, kv head).
      stages: stages of the shared-memory ring, at least 2 a compute warpgroup.
      cluster: thread blocks of a cluster, which merge their parts with one another:
        1, 2, 4 or 8, and a divisor of ``splits``.
      warpgroups: compute warpgroups of a thread block, 1 or 2; they take the slots in
        turn.
    """

    splits: int
    stages: int = 2
    cluster: int = 1
    warpgroups: int = 1

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"splits is {self.splits}; it must be at least 1")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"warpgroups is {self.warpgroups}; allowed: 1, 2")
        if self.stages < 2 * self.warpgroups:
            raise ValueError(
                f"stages is {self.stages}; it must be at least {2 * self.warpgroups}, "
                "two a compute warpgroup"
            )
        if self.cluster not in (1, 2, 4, 8) or self.splits % self.cluster:
            raise ValueError(
                f"cluster is {self.cluster}; allowed: 1, 2, 4, 8, dividing splits, "
                f"{self.splits}"
            )

    def shared_bytes(self, head_dim: int, block: int) -> int:
        """Shared memory for queries and the ring, in bytes.

        Results take the place of the ring, which is at least as large.
        """
        return 2 * head_dim * (WARPGROUP_ROWS + 2 * self.stages * block)


def default_config(
    batch: int, kv_heads: int, listed: int, head_dim: int, block: int
) -> Config:
    """Two thread blocks for each of 132 multiprocessors, or one a (row, kv head)."""
    pairs = batch * kv_heads
    room = (SHARED_BYTES - 4096) // (2 * head_dim) - WARPGROUP_ROWS
    stages = max(2, min(6, room // (2 * block)))
    if pairs >= 128 and stages >= 4:
        return Config(1, stages, warpgroups=2)
    splits = max(1, min(cdiv(264, pairs), cdiv(listed, 2)))
    return Config(splits, min(stages, 3))


def config_for(
    batch: int, kv_heads: int, listed: int, head_dim: int, block: int
) -> Config:
    """The recorded settings of this device kind, or the heuristic."""
    sizes = {"B": batch, "K": kv_heads, "P": listed, "H": head_dim, "block": block}
    found = tuned_config("paged_decode_attention", "mosaic_gpu", sizes)
    if found:
        return Config(**found)
    return default_config(batch, kv_heads, listed, head_dim, block)
