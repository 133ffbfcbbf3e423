"""Tiles of query rows: consecutive tokens with all heads of a group side by side."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def fold_queries(
    q: Float[Array, "B T N H"], kv_heads: int, tokens: int, rows: int
) -> Float[Array, "B K tokens rows H"]:
    """Rows of a kv head by token, with zeros up to whole tiles.

    Args:
      q: queries.
      kv_heads: K.
      tokens: T rounded up to whole tiles.
      rows: rows of a token, at least G.
    """
    batch, length, heads, head_dim = q.shape
    groups = heads // kv_heads
    query = q.reshape(batch, length, kv_heads, groups, head_dim)
    query = jnp.moveaxis(query, 2, 1)
    grow = ((0, 0), (0, 0), (0, tokens - length), (0, rows - groups), (0, 0))
    return jnp.pad(query, grow)


def unfold_queries(
    x: Float[Array, " *folded"],
    q: Float[Array, "B T N H"],
    kv_heads: int,
    tokens: int,
    rows: int,
) -> Float[Array, "B T N *H"]:
    """Undoes ``fold_queries`` for a result with or without the axis of H.

    Args:
      x: [B, K, tokens, rows] in any shape that keeps the order, H after it or not.
      q: the queries, for the sizes.
      kv_heads: K.
      tokens: as for ``fold_queries``.
      rows: as for ``fold_queries``.
    """
    batch, length, heads, head_dim = q.shape
    tail = () if x.size == batch * kv_heads * tokens * rows else (head_dim,)
    x = x.reshape(batch, kv_heads, tokens, rows, *tail)
    x = jnp.moveaxis(x[:, :, :length, : heads // kv_heads], 1, 2)
    return x.reshape(batch, length, heads, *tail)
