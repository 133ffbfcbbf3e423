"""The definition of the commit."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common.numerics import in_32_bit


@in_32_bit
def commit_blocks_reference(
    slots: Float[Array, " R *E"],
    staged: Float[Array, " J *E"],
    indices: Int[Array, " J"],
) -> Float[Array, " R *E"]:
    """``slots`` with row ``indices[j]`` replaced by ``staged[j]`` where it is >= 0."""
    rows = jnp.where(indices < 0, slots.shape[0], indices)
    return slots.at[rows].set(staged, mode="drop")
