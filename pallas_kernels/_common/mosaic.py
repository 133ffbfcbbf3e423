"""What the Mosaic GPU kernels share (Hopper: wgmma, TMA, 227 KiB of shared memory)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._common.dispatch import require_cuda

# A warpgroup's matrix instruction has 64 rows.
WARPGROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
# Finite stand-in for -inf as a running maximum: the difference of two is never NaN.
LOWEST = -1e30


def operand_transforms() -> tuple[Any, ...]:
    """Layout of a 16-bit shared-memory tile that TMA writes and wgmma reads."""
    return (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def require_mosaic_sizes(dtype: Any, head_dim: int, block: int) -> None:
    """Refuses what the Mosaic kernels cannot tile.

    Raises:
      NotImplementedError: naming the size or dtype, or the missing device.
    """
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"mosaic_gpu needs bfloat16 or float16 for wgmma, not {jnp.dtype(dtype)}"
        )
    if head_dim % 64 or not 64 <= head_dim <= 256:
        raise NotImplementedError(
            f"mosaic_gpu needs a head dim of 64, 128, 192 or 256, not {head_dim}"
        )
    if block not in (16, 32, 64, 128):
        raise NotImplementedError(
            f"mosaic_gpu needs a block size of 16, 32, 64 or 128, not {block}"
        )
    require_cuda("mosaic_gpu", 9.0)
