"""Committing blocks in XLA: the portable form.

On a CPU a loop over the entries that count, each an update-slice in place; XLA's
scatter there would walk over every element of every entry. On a GPU the scatter is one
kernel, and a loop would wait for the host at every turn.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels._common.devices import current_platform
from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.commit_blocks.reference import commit_blocks_reference


@in_32_bit
def commit_blocks_xla(
    slots: Float[Array, " R *E"],
    staged: Float[Array, " J *E"],
    indices: Int[Array, " J"],
) -> Float[Array, " R *E"]:
    """Computes the result. Nothing is checked here."""
    return commit_stored_blocks_xla(slots, (staged,), indices, lambda parts: parts[0])


@in_32_bit
def commit_stored_blocks_xla(
    slots: Float[Array, " R *E"],
    staged: tuple[Shaped[Array, "J ..."], ...],
    indices: Int[Array, " J"],
    decode: Callable[[tuple[Array, ...]], Array],
) -> Float[Array, " R *E"]:
    """The same of blocks that are decoded on the way. Nothing is checked here."""
    if current_platform() != "cpu":
        return commit_blocks_reference(slots, decode(staged), indices)
    order = jnp.argsort(indices < 0, stable=True)
    count = jnp.sum(indices >= 0, dtype=jnp.int32)

    def body(i, slots):
        entry = order[i]
        parts = (lax.dynamic_slice_in_dim(part, entry, 1, 0) for part in staged)
        block = decode(tuple(parts))
        return lax.dynamic_update_slice_in_dim(slots, block, indices[entry], 0)

    return lax.fori_loop(0, count, body, slots)
