"""Gathering blocks on Mosaic GPU, straight out of pinned host memory.

Algorithm: a few persistent thread blocks walk over (entry, part of a block) pairs and
copy through registers; the GPU reads the pinned operand in place over the link. The
number of programs is a setting: 16 to 32 saturate a PCIe 5 link while leaving the
other multiprocessors to whatever runs beside the fetch. A Mosaic kernel is a custom
call, which stays out of CUDA graphs and can therefore overlap with them.

Measured on one H200 (PCIe 5 x16, jax 0.11.2, 1,536 blocks of 32 KiB out of 2 GiB, one
call, durations in a profile, spread at most 0.3 %): 51.0 to 51.2 GB/s with 8, 16, 32,
64 or 132 programs; a slice and contiguous copy of as many bytes 51.2. By the wall
clock a single call gave 36 to 43 GB/s, launch included.

Limits: blocks of a multiple of 1,024 bytes. Offsets are 64-bit: the operand may be as
large as memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.mosaic_copies import (
    Walk,
    WalkConfig,
    launch_walk,
    part_size,
)
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.host_gather.operands import Gather


@dataclass(frozen=True)
class Config(WalkConfig):
    """Settings of the kernel, with this operation's default."""

    programs: int = 16


@in_32_bit
def host_gather_mosaic_gpu(
    operands: Gather, *, config: Config | None = None
) -> Shaped[Array, " J *E"]:
    """Computes the result in device memory.

    Args:
      operands: blocks and the list.
      config: settings; recorded or default ones if None.

    Returns:
      The rows; zeros, or whatever was there, for negative indices.

    Raises:
      NotImplementedError: for blocks of an odd size, or without a Hopper device.
    """
    require_cuda("mosaic_gpu", 9.0)
    blocks, listed, elements = operands.blocks, operands.listed, operands.elements
    rows, size = blocks.shape[0], part_size(elements, blocks.dtype)
    parts = elements // size
    if config is None:
        found = tuned_config("host_gather", "mosaic_gpu", {"parts": parts})
        config = Config(**found) if found else Config()
    walk = Walk(listed, elements, size, min(config.programs, listed * parts))

    def move(entry, row, columns, blocks_ref, out_ref):
        @pl.when(row >= 0)
        def _copy():
            source = jnp.minimum(row, rows - 1)
            out_ref[entry, columns] = blocks_ref[source, columns]

        if operands.zero_skipped:

            @pl.when(row < 0)
            def _skip():
                out_ref[entry, columns] = jnp.zeros((size,), blocks.dtype)

    out = launch_walk(
        move,
        [blocks.reshape(rows, elements)],
        operands,
        walk,
        out_type=jax.ShapeDtypeStruct((listed, elements), blocks.dtype),
        name="host_gather_mosaic_gpu",
    )
    return out.reshape(listed, *blocks.shape[1:])
