"""Scoring and choosing a slab of tokens at a time, so that T x M is never written."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.numerics import cdiv

# Scores of one slab: rows x kv heads x tokens x blocks.
SLAB_SCORES = 16 * 2**20

type Chosen = tuple[Int[Array, "B K T P"], Float[Array, "B T N"] | None]


def slab_tokens(per_token: int, tile: int, slab: int | None) -> int:
    """Tokens of a slab, a multiple of ``tile``.

    Args:
      per_token: scores that a token has, over all rows and kv heads.
      tile: tokens of a kernel's tile.
      slab: the caller's wish, or None.
    """
    if slab is None:
        slab = SLAB_SCORES // per_token
    return tile * max(1, slab // tile)


def over_slabs(
    query: Float[Array, "B T N H"],
    q_start: Int[Array, " B"],
    slab: int,
    one: Callable[[Float[Array, "B t N H"], Int[Array, " B"]], Chosen],
) -> Chosen:
    """Applies ``one`` to slabs of tokens in turn and joins what it returns.

    Args:
      query: queries.
      q_start: position of token 0 of each row.
      slab: tokens of a slab.
      one: from queries and first positions to lists and log-sum-exp (or None).

    Returns:
      Lists and log-sum-exp of all tokens.
    """
    batch, length, heads, head_dim = query.shape
    if length <= slab:
        return one(query, q_start)
    slabs = cdiv(length, slab)
    query = jnp.pad(query, ((0, 0), (0, slabs * slab - length), (0, 0), (0, 0)))
    query = query.reshape(batch, slabs, slab, heads, head_dim)

    def step(i):
        return one(query[:, i], q_start + i * slab)

    lists, found = lax.map(step, jnp.arange(slabs, dtype=jnp.int32))
    lists = jnp.moveaxis(lists, 0, 2)
    kv_heads, budget = lists.shape[1], lists.shape[-1]
    lists = lists.reshape(batch, kv_heads, slabs * slab, budget)[:, :, :length]
    if found is not None:
        found = jnp.moveaxis(found, 0, 1)
        found = found.reshape(batch, slabs * slab, heads)[:, :length]
    return lists, found


def by_head(
    query: Float[Array, "B T N H"], kv_heads: int, tile: int
) -> Float[Array, "B K G padded H"]:
    """Queries by head, T rounded up to whole tiles."""
    batch, length, heads, head_dim = query.shape
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    query = jnp.transpose(query, (0, 2, 3, 1, 4))
    return jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, -length % tile), (0, 0)))


def by_token(x: Float[Array, "B K G padded"], length: int) -> Float[Array, "B T N"]:
    """A value of each row of ``by_head``, by token again."""
    x = jnp.transpose(x[..., :length], (0, 3, 1, 2))
    return x.reshape(x.shape[0], length, -1)
