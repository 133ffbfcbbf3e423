"""Committing blocks in XLA: the portable form.

On a CPU a loop over the entries that count, each an update-slice in place; XLA's
scatter there would walk over every element of every entry. On a GPU the scatter is one
kernel, which takes the decoding of blocks in 8 bits in and computes skipped entries as
well; a loop would wait for the host at every turn.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from pallas_kernels._common.devices import current_platform
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.commit_blocks.int8 import decoded
from pallas_kernels.commit_blocks.operands import Commit
from pallas_kernels.commit_blocks.reference import commit_blocks_reference


@in_32_bit
def commit_blocks_xla(operands: Commit) -> Shaped[Array, " R *E"]:
    """Computes the result."""
    if current_platform() != "cpu":
        return commit_blocks_reference(operands)
    slots, staged, scales = operands.slots, operands.staged, operands.scales
    indices = operands.masked()
    order = jnp.argsort(indices < 0, stable=True)
    count = jnp.sum(indices >= 0, dtype=jnp.int32)

    def body(i, slots):
        entry = order[i]
        block = lax.dynamic_slice_in_dim(staged, entry, 1, 0)
        if scales is not None:
            of_block = lax.dynamic_slice_in_dim(scales, entry, 1, 0)
            block = decoded(block, of_block, slots.dtype)
        return lax.dynamic_update_slice_in_dim(slots, block, indices[entry], 0)

    return lax.fori_loop(0, count, body, slots)
