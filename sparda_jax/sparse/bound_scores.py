"""Block scores by extreme keys: no key of a block can have a larger product (Quest).

s_j = Σ_i max(q_i · m_{j,i}, q_i · M_{j,i}) with the least and largest key m, M of page
j; a block has the score of its best page. Whose query it is, and how the query heads of
a group come to one score, is the selector's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.sparse.masked import masked_softmax


def bound_scores(
    q: Float[Array, "B T heads H"],
    bounds: Float[Array, "B K pages 2 H"],
    num_blocks: int,
    *,
    largest: bool = False,
) -> Float[Array, "B K T M"]:
    """The bounds of a kv head's queries, summed or the largest of them.

    Args:
      q: Queries, those of a kv head next to each other.
      bounds: Minima and maxima of every page (`KeyBounds`).
      num_blocks: M, whose pages they are.
      largest: The best query decides; else their sum.

    Returns:
      Scores; −∞ for blocks without keys.
    """
    scores, held = _products(q, bounds, summed=not largest)
    return _of_blocks(scores.max(axis=2), held, num_blocks)


def bound_softmax_scores(
    q: Float[Array, "B T heads H"],
    bounds: Float[Array, "B K pages 2 H"],
    num_blocks: int,
    *,
    positions: Int[Array, "B T"],
    page: int,
) -> Float[Array, "B K T M"]:
    """The bounds of each query's softmax over pages, summed over a group.

    As own queries are scored over key means (docs/algorithm.md §2.3), scale included: a
    head counts by the share of its attention that a page may have, not by how large its
    products are. Pages that do not end before the query get 0: they are of forced or of
    future blocks, and a prompt's rows then choose what decode chooses ahead, without
    the newest key (docs/algorithm.md §4.4).

    Args:
      q: Queries, those of a kv head next to each other.
      bounds: Minima and maxima of every page (`KeyBounds`).
      num_blocks: M, whose pages they are.
      positions: Of the queries.
      page: Tokens of a page.

    Returns:
      Scores; −∞ for blocks without keys.
    """
    scores, held = _products(q, bounds, summed=False)
    last = (jnp.arange(bounds.shape[2]) + 1) * page - 1
    past = (last < positions[:, :, None])[:, None, None]  # B 1 1 T pages
    scores = jnp.where(past, scores * q.shape[-1] ** -0.5, -jnp.inf)
    return _of_blocks(jnp.sum(masked_softmax(scores), axis=2), held, num_blocks)


def _products(
    q: Float[Array, "B T heads H"],
    bounds: Float[Array, "B K pages 2 H"],
    *,
    summed: bool,
) -> tuple[Float[Array, "B K G T pages"], Bool[Array, "B K pages"]]:
    """Bounds of the products of queries, or of their sum, and which pages have keys.

    max(q·m, q·M) is q⁺·M + q⁻·m, so that one product serves all channels, and one query
    the whole sum over a group.
    """
    batch, steps, heads, dim = q.shape
    kv_heads = bounds.shape[1]
    q = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    signed = jnp.stack((jnp.minimum(q, 0), jnp.maximum(q, 0)), axis=-2)
    if summed:
        signed = jnp.sum(signed, axis=3, keepdims=True)
    # Pages without keys are not to be chosen; their infinities times 0 are no numbers.
    held = bounds[..., 0, :] <= bounds[..., 1, :]
    bounds = jnp.where(held[..., None, :], bounds, 0).astype(q.dtype)
    scores = jnp.einsum(
        "btkgsh,bkmsh->bkgtm", signed, bounds, preferred_element_type=jnp.float32
    )
    return scores, jnp.any(held, -1)


def _of_blocks(
    scores: Float[Array, "B K T pages"], held: Bool[Array, "B K pages"], num_blocks: int
) -> Float[Array, "B K T M"]:
    """A block has its best page's; −∞ without keys."""
    scores = jnp.where(held[:, :, None], scores, -jnp.inf)
    return scores.reshape(*scores.shape[:3], num_blocks, -1).max(-1)
