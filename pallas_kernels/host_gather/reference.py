"""The definition of the gather."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.host_gather.operands import Gather


@in_32_bit
def host_gather_reference(operands: Gather) -> Shaped[Array, " J *E"]:
    """Row ``indices[j]`` of ``blocks``, or zeros where ``indices[j]`` is negative."""
    blocks, indices = operands.blocks, operands.masked()
    rows = blocks[jnp.clip(indices, 0, blocks.shape[0] - 1)]
    skipped = (indices < 0).reshape(-1, *(1,) * (blocks.ndim - 1))
    return jnp.where(skipped, jnp.zeros_like(rows), rows)
