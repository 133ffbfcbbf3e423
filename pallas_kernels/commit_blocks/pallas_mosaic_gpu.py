"""Committing blocks on Mosaic GPU, in place.

Algorithm: that of ``pallas_triton.py``. The slots are a mutable operand; persistent
thread blocks walk over (entry, part of a block) pairs and copy the parts of entries
that are not skipped through registers.

Measured on one H200 (jax 0.11.2, 3,072 entries of 32 KiB): 13.5 us with 10 % of them
committed and 60.9 us with all, Triton 13.9 and 60.6.

Blocks in 8 bits are Triton's: their scales are looked up by element, for which a
warpgroup has no load; a walk by rows of one channel vector each was not tried.

Limits: blocks of a multiple of 1,024 bytes; compute capability 9.0 and newer. Inside
``compute_on`` it cannot run (no state discharge rule): the writes of a prefill to host
memory are Triton's.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
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
from pallas_kernels.commit_blocks.operands import Commit
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config(WalkConfig):
    """Settings of the kernel, with this operation's default."""

    programs: int = 264


@in_32_bit
def commit_blocks_mosaic_gpu(
    operands: Commit, *, config: Config | None = None
) -> Shaped[Array, " R *E"]:
    """Computes the result in place; the arguments are those of the Triton form.

    Raises:
      NotImplementedError: for blocks of an odd size, or without such a device.
    """
    require_cuda("mosaic_gpu", 9.0)
    slots, listed, elements = operands.slots, operands.listed, operands.elements
    rows, size = slots.shape[0], part_size(elements, slots.dtype)
    config = config or Config(
        **tuned_config("commit_blocks", "mosaic_gpu", {"elements": elements})
    )
    programs = min(config.programs, listed * (elements // size))

    def move(entry, row, columns, slots_ref, staged_ref):
        @pl.when(row >= 0)
        def _copy():
            there = lax.min(row, jnp.int32(rows - 1))
            slots_ref[there, columns] = staged_ref[entry, columns]

    held = jax.new_ref(slots.reshape(rows, elements))
    launch_walk(
        move,
        [held, operands.staged.reshape(listed, elements)],
        operands,
        Walk(listed, elements, size, programs),
        out_type=(),
        name="commit_blocks_mosaic_gpu",
    )
    return jax.freeze(held).reshape(slots.shape)
