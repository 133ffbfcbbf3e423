"""Block scores by extreme keys: no key of a block can have a larger product (Quest).

s_j = Σ_i max(q_i · m_{j,i}, q_i · M_{j,i}) with the least and largest key m, M of page
j; a block has the score of its best page. Whose query it is, is the selector's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def bound_scores(
    q: Float[Array, "B T heads H"],
    bounds: Float[Array, "B K pages 2 H"],
    num_blocks: int,
    *,
    largest: bool = False,
) -> Float[Array, "B K T M"]:
    """The bounds of a kv head's queries, summed or the largest of them.

    max(q·m, q·M) is q⁺·M + q⁻·m, so that one product serves all channels, and one query
    the whole sum over a group.

    Args:
      q: Queries, those of a kv head next to each other.
      bounds: Minima and maxima of every page (`KeyBounds`).
      num_blocks: M, whose pages they are.
      largest: The best query decides; else their sum.

    Returns:
      Scores; −∞ for blocks without keys.
    """
    batch, steps, heads, dim = q.shape
    kv_heads = bounds.shape[1]
    q = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    signed = jnp.stack((jnp.minimum(q, 0), jnp.maximum(q, 0)), axis=-2)
    if not largest:
        signed = jnp.sum(signed, axis=3, keepdims=True)
    # Pages without keys are not to be chosen; their infinities times 0 are no numbers.
    held = bounds[..., 0, :] <= bounds[..., 1, :]
    bounds = jnp.where(held[..., None, :], bounds, 0).astype(q.dtype)
    scores = jnp.einsum(
        "btkgsh,bkmsh->bkgtm", signed, bounds, preferred_element_type=jnp.float32
    ).max(axis=2)
    scores = jnp.where(jnp.any(held, -1)[:, :, None], scores, -jnp.inf)
    return scores.reshape(*scores.shape[:3], num_blocks, -1).max(-1)
