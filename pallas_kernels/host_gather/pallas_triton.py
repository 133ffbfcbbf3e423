"""Gathering blocks on Triton, straight out of pinned host memory.

Algorithm and settings as in the Mosaic form. Under CUDA graphs a Triton kernel is
captured into the same serial graph as the compute, so that it overlaps less well.

Measured on one H200 (PCIe 5 x16, jax 0.11.2, 1,536 blocks of 32 KiB out of 2 GiB, one
call, durations in a profile, spread at most 0.4 %): 50.9 to 51.3 GB/s with 8, 16, 32,
64 or 132 programs.

Limits: blocks of a multiple of 256 bytes. Offsets are 64-bit where the operand needs
them. The back end is deprecated in JAX; this file
can be deleted with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Shaped

from pallas_kernels._common.copies import CopyConfig, copy_listed
from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.host_gather.operands import Gather


@dataclass(frozen=True)
class Config(CopyConfig):
    """Settings of the kernel."""

    programs: int = 32
    part_bytes: int = 16 * 1024
    num_warps: int = 8

    @property
    def num_stages(self) -> int:
        """Depth of the load pipeline."""
        return 2


@in_32_bit
def host_gather_triton(
    operands: Gather, *, config: Config | None = None, interpret: bool = False
) -> Shaped[Array, " J *E"]:
    """Computes the result in device memory.

    Args:
      operands: blocks and the list.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The rows; zeros, or whatever was there, for negative indices.

    Raises:
      NotImplementedError: for blocks of an odd size, or without a CUDA device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    blocks = operands.blocks
    rows, shape = blocks.shape[0], blocks.shape[1:]
    config = config or Config(
        **tuned_config("host_gather", "triton", {"elements": operands.elements})
    )

    zero = 0.0 if jnp.issubdtype(blocks.dtype, jnp.floating) else 0

    def move(refs, out_ref, j, row, columns):
        [blocks_ref] = refs
        # A masked load moves nothing for a skipped entry.
        wanted = jnp.full((columns.size,), row >= 0)
        part = plt.load(
            blocks_ref.at[jnp.clip(row, 0, rows - 1), columns], mask=wanted, other=zero
        )
        kept = None if operands.zero_skipped else wanted
        plt.store(out_ref.at[j, columns], part, mask=kept)

    return copy_listed(
        move,
        (blocks,),
        operands,
        out=jax.ShapeDtypeStruct((operands.listed, *shape), blocks.dtype),
        config=config,
        name="host_gather_triton",
        staggered=True,
        interpret=interpret,
    )
