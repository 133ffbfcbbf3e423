"""The choice in XLA: a sort of every row. The portable form."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.numerics import NEG_INF, in_32_bit
from pallas_kernels.choose_blocks.forced import Forced


@in_32_bit
def choose_blocks_xla(
    scores: Float[Array, "*rows M"],
    own: Int[Array, "*#rows"],
    *,
    budget: int,
    forced: Forced | None = None,
) -> Int[Array, "*rows P"]:
    """Computes the result, the best block first. Nothing is checked here."""
    if forced is not None:
        scores = forced.apply(scores, jnp.arange(scores.shape[-1]), own[..., None])
    # XLA would put -0.0 behind 0.0, its equal.
    scores = jnp.where(scores == 0.0, 0.0, scores)
    best, index = lax.top_k(scores, min(budget, scores.shape[-1]))
    found = (best != NEG_INF) & (index <= own[..., None])
    index = jnp.where(found, index, -1).astype(jnp.int32)
    grow = [(0, 0)] * (index.ndim - 1) + [(0, budget - index.shape[-1])]
    return jnp.pad(index, grow, constant_values=-1)
