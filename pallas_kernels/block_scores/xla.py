"""Block scores and the choice in XLA: what CPUs run, and every device can.

Algorithm: queries are cut into tiles so that scores against all windows exist for one
tile only; pooling, forcing and, for the choice, top-k happen inside the tile's step.
Pooling is an elementwise maximum over the ``per_block + before`` shifted slices.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.dispatch import in_32_bit
from pallas_kernels._common.numerics import (
    NEG_INF,
    cdiv,
    einsum_f32,
    finite_or_zero,
)
from pallas_kernels.block_scores.rule import Rule

# Logits of one tile: tokens x heads x windows.
TILE_LOGITS = 4 * 2**20


def _tile(query, keys, position, num_windows, rule: Rule):
    """Scores [B, K, T, M] and log-sum-exp [B, T, N] of one tile of queries."""
    batch, tokens, heads, head_dim = query.shape
    kv_heads, windows = keys.shape[1:3]
    window = jnp.arange(windows)
    exists = window < num_windows[:, None]  # B W
    seen = rule.visible(window, position[..., None]) & exists[:, None]  # B T W
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    logits = rule.scale * einsum_f32("btkgh,bkwh->bkgtw", grouped, keys)
    logits = jnp.where(seen[:, None, None], logits, NEG_INF)
    top = finite_or_zero(logits.max(-1, initial=NEG_INF))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, NEG_INF, top + jnp.log(total))
    if rule.softmax:
        scores = (weights / total[..., None]).sum(2)
        scores = jnp.where(exists[:, None, None], scores, NEG_INF)
    else:
        scores = logits.max(2)
    # Windows -before .. blocks * per_block - 1, so that block b's are a plain slice.
    stop = rule.blocks * rule.per_block
    scores = scores[..., :stop]
    grow = ((0, 0), (0, 0), (0, 0), (rule.before, stop - scores.shape[-1]))
    scores = jnp.pad(scores, grow, constant_values=NEG_INF)
    pooled = None
    for i in range(rule.before + rule.per_block):
        part = scores[..., i :: rule.per_block][..., : rule.blocks]
        pooled = part if pooled is None else jnp.maximum(pooled, part)
    assert pooled is not None
    pooled = rule.force(
        pooled, jnp.arange(rule.blocks, dtype=jnp.int32), position[:, None, :, None]
    )
    return pooled, jnp.moveaxis(lse, 3, 1).reshape(batch, tokens, heads)


def _tiled(query, compressed_keys, q_start, num_windows, layer, rule: Rule, finish):
    """Maps ``finish(scores, lse, position)`` over tiles; token axes are named by it."""
    batch, length, heads, head_dim = query.shape
    keys = compressed_keys[layer]
    size = max(1, min(length, TILE_LOGITS // (batch * heads * max(1, keys.shape[2]))))
    count = cdiv(length, size)
    size = cdiv(length, count)
    grow = ((0, 0), (0, count * size - length), (0, 0), (0, 0))
    query = jnp.pad(query, grow).reshape(batch, count, size, heads, head_dim)
    start = q_start[:, None] + jnp.arange(count) * size
    position = start[..., None] + jnp.arange(size)  # B tiles T

    def one(tile):
        query, position = tile
        scores, lse = _tile(query, keys, position, num_windows, rule)
        return finish(scores, position), lse

    if count == 1:
        out, lse = one((query[:, 0], position[:, 0]))
        return out, lse
    out, lse = lax.map(one, (jnp.moveaxis(query, 1, 0), jnp.moveaxis(position, 1, 0)))
    # out: tiles B K T ?, lse: tiles B T N.
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(*out.shape[:2], count * size, out.shape[-1])[:, :, :length]
    lse = jnp.moveaxis(lse, 0, 1).reshape(batch, count * size, heads)[:, :length]
    return out, lse


@in_32_bit
def block_scores_xla(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "L B K W H"],
    q_start: Int[Array, " B"],
    num_windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    rule: Rule,
    lse: bool = True,
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"]]:
    """Computes scores and log-sum-exp; the arguments are those of the reference.

    ``lse`` is what other implementations skip; here XLA drops what nobody uses.
    """
    del lse
    return _tiled(
        query,
        compressed_keys,
        q_start,
        num_windows,
        layer,
        rule,
        lambda scores, position: scores,
    )


def choose_xla(
    scores: Float[Array, "B K T M"],
    position: Int[Array, "B T"],
    rule: Rule,
    budget: int,
) -> Int[Array, "B K T P"]:
    """The ``budget`` best blocks of each row, -1 where there are fewer."""
    best, index = lax.top_k(scores, min(budget, rule.blocks))
    own = (position // rule.block_size)[:, None, :, None]
    index = jnp.where((best == NEG_INF) | (index > own), -1, index)
    grow = ((0, 0), (0, 0), (0, 0), (0, budget - index.shape[-1]))
    return jnp.pad(index.astype(jnp.int32), grow, constant_values=-1)


@in_32_bit
def select_blocks_xla(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "L B K W H"],
    q_start: Int[Array, " B"],
    num_windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    rule: Rule,
    budget: int,
    lse: bool = True,
) -> tuple[Int[Array, "B K T P"], Float[Array, "B T N"]]:
    """Scores and chooses tile by tile; returns the lists and the log-sum-exp."""
    del lse
    return _tiled(
        query,
        compressed_keys,
        q_start,
        num_windows,
        layer,
        rule,
        lambda scores, position: choose_xla(scores, position, rule, budget),
    )
