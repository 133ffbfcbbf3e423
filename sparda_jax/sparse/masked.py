"""Softmax of logits of which all may be masked."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def masked_softmax(logits: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """Softmax along the last axis; masked logits are −∞, and zeros where all are."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
