"""Committing blocks on Triton, in place.

Algorithm: the slots are an aliased operand; persistent programs walk over (entry, part
of a block) pairs and copy the parts of entries that are not skipped. Nothing of a
skipped entry is read or written, so the time follows the misses. Blocks in 8 bits are
decoded in registers on the way: a part's integers are read as they lie, and the scale
of each from the entry's list of them.

Measured on one H200 (jax 0.11.2, commit 8638c4b, 3,072 entries of 32 KiB): 13.9 us with
10 % of them committed and 60.6 us with all (3,320 GB/s read and written); XLA's scatter
68.5 and 390 us. Inside the decode loop of an 8B shape, 288 of 3,072 committed and only
those looked at: 6 us, beside a running fetch. From 8 bits, 10 % committed (commit
fe9374e): 21.9 us, though half the bytes are read: every number's scale is looked up;
XLA 68.7.

Limits: blocks of a multiple of 256 bytes. The back end is deprecated in JAX; this file
can be deleted with it, which leaves the XLA scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int, Shaped

from pallas_kernels._common.copies import CopyConfig, copy_listed
from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.commit_blocks.operands import Commit
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config(CopyConfig):
    """Settings of the kernel."""

    programs: int = 528
    part_bytes: int = 16 * 1024
    num_warps: int = 4


@in_32_bit
def commit_blocks_triton(
    operands: Commit, *, config: Config | None = None, interpret: bool = False
) -> Shaped[Array, " R *E"]:
    """Computes the result in place.

    Args:
      operands: slots, staged blocks and the list.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The slots with the blocks in them.

    Raises:
      NotImplementedError: for blocks of an odd size, or without a CUDA device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    slots, scales = operands.slots, operands.scales
    rows = slots.shape[0]
    config = config or Config(
        **tuned_config(
            "commit_blocks",
            "triton",
            {"elements": operands.elements, "int8": scales is not None},
        )
    )

    def move(refs, slots_ref, j, row, columns):
        _, staged_ref, *scales_ref = refs

        @pl.when(row >= 0)
        def _():
            part = staged_ref[j, columns]
            if scales_ref:
                element = columns.start + jnp.arange(columns.size)
                scale = plt.load(scales_ref[0].at[j, _place_of_scale(element, dim)])
                part = (part.astype(jnp.float32) * scale).astype(slots.dtype)
            slots_ref[jnp.minimum(row, rows - 1), columns] = part

    dim = slots.shape[-1]
    return copy_listed(
        move,
        (slots, operands.staged),
        operands,
        out=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
        config=config,
        name="commit_blocks_triton",
        beside=() if scales is None else (scales,),
        in_place=True,
        interpret=interpret,
    )


def _place_of_scale(element: Int[Array, " n"], dim: int) -> Int[Array, " n"]:
    """Where the scale of an element of a block [block, 2, H] stands."""
    row, channel = lax.div(element, jnp.int32(dim)), lax.rem(element, jnp.int32(dim))
    token, is_value = lax.div(row, jnp.int32(2)), lax.rem(row, jnp.int32(2))
    return jnp.where(is_value == 1, dim + token, channel)
