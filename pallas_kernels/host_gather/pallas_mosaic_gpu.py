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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Shaped

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.mosaic_copies import (
    WalkConfig,
    checked_part_size,
    walk_listed,
)
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config(WalkConfig):
    """Settings of the kernel, with this operation's default."""

    programs: int = 16


@in_32_bit
def host_gather_mosaic_gpu(
    blocks: Shaped[Array, " R *E"],
    indices: Int[Array, " J"],
    count: Int[Array, ""] | None = None,
    *,
    zero_skipped: bool = True,
    config: Config | None = None,
) -> Shaped[Array, " J *E"]:
    """Computes the result in device memory.

    Args:
      blocks: operand in pinned host or device memory.
      indices: listed rows, negative for none.
      count: entries that are looked at; all if None.
      zero_skipped: write zeros where an entry was skipped, rather than nothing.
      config: settings; recorded or default ones if None.

    Returns:
      The rows; zeros, or whatever was there, for negative indices.

    Raises:
      NotImplementedError: for blocks of an odd size, or without a Hopper device.
    """
    require_cuda("mosaic_gpu", 9.0)
    rows, shape = blocks.shape[0], blocks.shape[1:]
    elements = blocks.size // rows
    size = checked_part_size(elements, blocks.dtype)
    listed, parts = indices.shape[0], elements // size
    if config is None:
        found = tuned_config("host_gather", "mosaic_gpu", {"parts": parts})
        config = Config(**found) if found else Config()
    programs = min(config.programs, listed * parts)

    if count is None:
        count = jnp.int32(listed)

    def host_gather_mosaic_gpu(blocks_ref, indices_ref, count_ref, out_ref):
        def move(entry, row, columns):
            @pl.when(row >= 0)
            def _copy():
                source = jnp.minimum(row, rows - 1)
                out_ref[entry, columns] = blocks_ref[source, columns]

            if zero_skipped:

                @pl.when(row < 0)
                def _skip():
                    out_ref[entry, columns] = jnp.zeros((size,), blocks.dtype)

        walk_listed(
            move,
            indices_ref,
            count_ref[0],
            listed=listed,
            parts=parts,
            size=size,
            programs=programs,
        )

    out = plgpu.kernel(
        host_gather_mosaic_gpu,
        out_type=jax.ShapeDtypeStruct((listed, elements), blocks.dtype),
        grid=(programs,),
        grid_names=("program",),
    )(blocks.reshape(rows, elements), indices, count.reshape(1))
    return out.reshape(listed, *shape)
