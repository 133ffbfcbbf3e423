"""Scoring and choosing a slab of tokens at a time, so that T x M is never written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.numerics import cdiv
from pallas_kernels.block_scores.operands import Scoring

# Scores of one slab: rows x kv heads x tokens x blocks.
SLAB_SCORES = 16 * 2**20

type Chosen = tuple[Int[Array, "B K T P"], Float[Array, "B T N"] | None]


def over_slabs(
    operands: Scoring,
    tile: int,
    slab: int | None,
    one: Callable[[Scoring], Chosen],
) -> Chosen:
    """Applies ``one`` to slabs of tokens in turn and joins what it returns.

    Args:
      operands: of all tokens.
      tile: tokens of a kernel's tile, of which a slab is a multiple.
      slab: the caller's wish for the tokens of a slab, or None.
      one: from operands of a slab to lists and log-sum-exp (or None).

    Returns:
      Lists and log-sum-exp of all tokens.
    """
    query = operands.query
    batch, length, heads, head_dim = query.shape
    if slab is None:
        slab = SLAB_SCORES // (batch * operands.kv_heads * operands.rule.blocks)
    slab = tile * max(1, slab // tile)
    if length <= slab:
        return one(operands)
    slabs = cdiv(length, slab)
    query = jnp.pad(query, ((0, 0), (0, slabs * slab - length), (0, 0), (0, 0)))
    query = query.reshape(batch, slabs, slab, heads, head_dim)

    def step(i):
        start = operands.q_start + i * slab
        return one(dataclasses.replace(operands, query=query[:, i], q_start=start))

    lists, found = lax.map(step, jnp.arange(slabs, dtype=jnp.int32))
    lists = jnp.moveaxis(lists, 0, 2)
    kv_heads, budget = lists.shape[1], lists.shape[-1]
    lists = lists.reshape(batch, kv_heads, slabs * slab, budget)[:, :, :length]
    if found is not None:
        found = jnp.moveaxis(found, 0, 1)
        found = found.reshape(batch, slabs * slab, heads)[:, :length]
    return lists, found


def own_blocks(operands: Scoring) -> Int[Array, "B 1 T"]:
    """Number of each query's own block, for all kv heads."""
    position = operands.q_start[:, None] + jnp.arange(operands.query.shape[1])
    return (position // operands.rule.block_size)[:, None]


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
