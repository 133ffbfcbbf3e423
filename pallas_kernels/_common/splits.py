"""Merging attention computed over parts of the keys."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import NEG_INF, finite_or_zero


def merge_splits(
    out: Float[Array, "*rows splits G H"], lse: Float[Array, "*rows splits G"]
) -> tuple[Float[Array, "*rows G H"], Float[Array, "*rows G"]]:
    """Merges normalised partial outputs through their log-sum-exps.

    Args:
      out: partial outputs, float32.
      lse: log-sum-exp of each part, float32; -inf for a part without keys.

    Returns:
      The output and log-sum-exp over all parts, float32; 0 and -inf without keys.
    """
    top = lse.max(-2)
    weights = jnp.exp(lse - finite_or_zero(top)[..., None, :])
    total = weights.sum(-2)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    merged = (out * weights[..., None]).sum(-3) / total[..., None]
    return merged, jnp.where(empty, NEG_INF, top + jnp.log(total))
