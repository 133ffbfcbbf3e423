"""The definition of the commit."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.commit_blocks.int8 import decoded
from pallas_kernels.commit_blocks.operands import Commit


@in_32_bit
def commit_blocks_reference(operands: Commit) -> Shaped[Array, " R *E"]:
    """``slots`` with row ``indices[j]`` replaced by ``staged[j]`` where it is >= 0.

    With ``scales``, by the block that they and the int8 ``staged[j]`` stand for.
    """
    slots, staged, indices = operands.slots, operands.staged, operands.masked()
    if operands.scales is not None:
        staged = decoded(staged, operands.scales, slots.dtype)
    rows = jnp.where(indices < 0, slots.shape[0], indices)
    return slots.at[rows].set(staged, mode="drop")
