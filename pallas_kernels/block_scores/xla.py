"""Block scores and the choice in XLA: what CPUs run, and every device can.

Algorithm: queries are cut into tiles, and a tile walks over chunks of windows up to
the last one that it may see, so that causality saves work and logits exist for one
chunk only. The raw form pools a chunk's products to blocks at once. The softmax form
walks twice: the first walk finds the log-sum-exp, the second takes the products again,
now as weights, sums the heads and pools windows to blocks.

Layout: products are [windows, G, T], so that maxima and sums over windows, heads and a
block's windows run along whole vectors of tokens. XLA's CPU back end does not divide a
reduction over the last axis among vector lanes.

Measured on one core of an Intel Xeon (jax 0.12.0.1, float32, N = 9, K = 3, H = 64,
1,024 tokens behind 4,096, windows of 8 keys, softmax form, least of 6): 0.051 s of CPU;
0.099 s when the first walk kept its exponentials for the second, because what a loop
keeps is written, copied into its place and read (2.5 of 4.6 ns an element). Chunks of
64 and 256 windows 0.054 and 0.051 s, tiles of 256 tokens 0.055 s at best. On an AMD
EPYC keeping them was the faster form.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.devices import current_platform
from pallas_kernels._common.numerics import (
    NEG_INF,
    cdiv,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
)
from pallas_kernels.block_scores.operands import Scoring
from pallas_kernels.block_scores.rule import Rule
from pallas_kernels.choose_blocks.xla import choose_blocks_xla

# Logits of one tile: tokens x heads x windows.
TILE_LOGITS = 4 * 2**20
# Tiles and chunks for CPUs, where a chunk's logits should stay in cache.
CPU_TOKENS = 128
CPU_WINDOWS = 128


def _tile_size(batch: int, length: int, heads: int, windows: int) -> int:
    """Tokens of a tile of queries; the tiles of a call are of equal size."""
    size = max(1, min(length, TILE_LOGITS // (batch * heads * max(1, windows))))
    if current_platform() == "cpu":
        size = min(size, CPU_TOKENS)
    return cdiv(length, cdiv(length, size))


def _chunk_windows(windows: int, per_block: int) -> int:
    """Windows of a chunk: those of whole blocks."""
    span = cdiv(windows, per_block) * per_block
    if current_platform() == "cpu":
        span = min(span, cdiv(CPU_WINDOWS, per_block) * per_block)
    return span


def scratch_bytes(
    *,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windows: int,
    blocks: int,
    per_block: int,
    itemsize: int,
) -> int:
    """Device bytes that ``select_blocks`` needs beside its operands and its result.

    Args:
      batch: B.
      tokens: T.
      heads: N.
      kv_heads: K.
      head_dim: H.
      windows: W.
      blocks: M.
      per_block: windows that start in a block.
      itemsize: bytes of a number of ``query``.

    Returns:
      What the XLA form holds at its widest point on the device at hand: the logits of
      a tile's chunk, their exponentials and the weights of the second walk, scores of
      blocks, and a copy of the queries by tile. Pallas forms need less.
    """
    tile = _tile_size(batch, tokens, heads, windows)
    span = min(windows, _chunk_windows(windows, per_block))
    logits = 3 * batch * tile * heads * span * 4
    queries = batch * tokens * heads * head_dim * itemsize if tile < tokens else 0
    return queries + logits + batch * tokens * kv_heads * blocks * 4


def _walk[Carry](
    steps: Int[Array, ""],
    chunks: int,
    body: Callable[[int | Int[Array, ""], Carry], Carry],
    carry: Carry,
) -> Carry:
    """``fori_loop`` over the first ``steps`` chunks, without the loop for one chunk."""
    if chunks == 1:
        return body(0, carry)
    return lax.fori_loop(0, steps, body, carry)


def _block_maxima(windows: Float[Array, "B K S T"], rule: Rule):
    """Maxima over each block's windows, and over the last ones that reach into others.

    The latter are the ``before % per_block`` last windows; None when there are none.
    """
    batch, kv_heads, _, tokens = windows.shape
    blocks = windows.reshape(batch, kv_heads, -1, rule.per_block, tokens)
    tail = rule.before % rule.per_block
    return blocks.max(3), blocks[:, :, :, -tail:].max(3) if tail else None


def _earlier(x: Float[Array, "B K M T"], blocks: int) -> Float[Array, "B K M T"]:
    """Block b gets what block ``b - blocks`` has; -inf where there is none."""
    blocks = min(blocks, x.shape[2])
    kept = x[:, :, : x.shape[2] - blocks]
    pad = ((0, 0), (0, 0), (blocks, 0), (0, 0))
    return jnp.pad(kept, pad, constant_values=NEG_INF)


def _tile(query, keys, position, num_windows, rule: Rule, lse: bool):
    """Scores [B, K, T, M] and log-sum-exp [B, T, N] (or None) of a tile of queries."""
    batch, tokens, heads, head_dim = query.shape
    kv_heads, windows = keys.shape[1:3]
    groups = heads // kv_heads
    span = _chunk_windows(windows, rule.per_block)
    chunks = cdiv(windows, span)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, chunks * span - windows), (0, 0)))
    num_windows = jnp.minimum(num_windows, windows)
    # Visible windows come first; none is needed beyond the tile's last one.
    reach = rule.kernel_size - 1 if rule.softmax else 0
    visible = (position.max() - reach) // rule.kernel_stride + 1
    steps = cdiv(jnp.clip(visible, 0, num_windows.max()), span)
    grouped = query.reshape(batch, tokens, kv_heads, groups, head_dim)
    grouped = jnp.moveaxis(grouped, (1, 4), (4, 2))  # B K H G T

    def number(step):
        return step * span + jnp.arange(span)

    def exists(step):
        return (number(step) < num_windows[:, None])[:, None, :, None]  # B 1 S 1

    def logits(step):
        part = lax.dynamic_slice_in_dim(keys, step * span, span, 2)
        seen = rule.visible(number(step)[:, None], position[:, None, None])  # B 1 S T
        seen = seen & exists(step)
        out = rule.scale * einsum_f32("bksh,bkhgt->bksgt", part, grouped)
        return jnp.where(seen[:, :, :, None], out, NEG_INF)

    def summed(out, top, total):
        """New maximum, and the new sum of exponentials relative to it."""
        new_top = jnp.maximum(top, out.max(2))
        shift = finite_or_zero(new_top)
        out = jnp.exp(out - shift[:, :, None])
        return new_top, total * jnp.exp(top - shift) + out.sum(2)

    start = (
        jnp.full((batch, kv_heads, groups, tokens), NEG_INF),
        jnp.zeros((batch, kv_heads, groups, tokens)),
    )
    block = jnp.arange(chunks * span // rule.per_block)
    shape = (batch, kv_heads, block.size, tokens)

    def unvisited(first):
        """Maximum of a block's windows from ``first`` on that no query sees."""
        there = block * rule.per_block + first < num_windows[:, None]
        value = jnp.where(there & rule.softmax, 0.0, NEG_INF)
        return jnp.broadcast_to(value[:, None, :, None], shape)

    tail = rule.before % rule.per_block
    pools = (unvisited(0), unvisited(rule.per_block - tail) if tail else None)

    def put(pools, step, scores):
        """Pools a chunk's window scores into the blocks that they start in."""
        place = step * (span // rule.per_block)
        return jax.tree.map(
            lambda pool, new: lax.dynamic_update_slice_in_dim(pool, new, place, 2),
            pools,
            _block_maxima(scores, rule),
        )

    def first_softmax(step, carry):
        return summed(logits(step), *carry)

    def first_raw(step, carry):
        top, total, pools = carry
        out = logits(step)
        pools = put(pools, step, out.max(3))
        if lse:
            top, total = summed(out, top, total)
        return top, total, pools

    if rule.softmax:
        top, total = _walk(steps, chunks, first_softmax, start)
        level = finite_or_zero(top) + jnp.log(jnp.where(total == 0.0, 1.0, total))

        def second(step, pools):
            scores = jnp.exp(logits(step) - level[:, :, None]).sum(3)
            return put(pools, step, jnp.where(exists(step), scores, NEG_INF))

        pools = _walk(steps, chunks, second, pools)
    else:
        top, total, pools = _walk(steps, chunks, first_raw, (*start, pools))
    pooled, tails = pools
    whole = rule.before // rule.per_block
    scores = pooled
    for back in range(1, whole + 1):
        scores = jnp.maximum(scores, _earlier(pooled, back))
    if tails is not None:
        scores = jnp.maximum(scores, _earlier(tails, whole + 1))
    grow = max(0, rule.blocks - block.size)
    scores = jnp.pad(
        scores, ((0, 0), (0, 0), (0, grow), (0, 0)), constant_values=NEG_INF
    )[:, :, : rule.blocks]
    scores = rule.force(
        jnp.swapaxes(scores, 2, 3),
        jnp.arange(rule.blocks, dtype=jnp.int32),
        position[:, None, :, None],
    )
    if not lse:
        return scores, None
    empty = total == 0.0
    value = jnp.where(empty, NEG_INF, top + jnp.log(jnp.where(empty, 1.0, total)))
    return scores, jnp.moveaxis(value, 3, 1).reshape(batch, tokens, heads)


def _tiled(operands: Scoring, lse: bool, finish):
    """Maps ``finish(scores, position)`` over tiles; returns it and the log-sum-exp."""
    batch, length, heads, head_dim = operands.query.shape
    keys = operands.compressed_keys[operands.layer]
    size = _tile_size(batch, length, heads, keys.shape[2])
    count = cdiv(length, size)
    grow = ((0, 0), (0, count * size - length), (0, 0), (0, 0))
    query = jnp.pad(operands.query, grow)
    query = query.reshape(batch, count, size, heads, head_dim)
    start = operands.q_start[:, None] + jnp.arange(count) * size
    position = start[..., None] + jnp.arange(size)  # B tiles T

    def one(tile):
        query, position = tile
        scores, value = _tile(
            query, keys, position, operands.num_windows, operands.rule, lse
        )
        return finish(scores, position), value

    if count == 1:
        return one((query[:, 0], position[:, 0]))
    out, value = lax.map(one, (jnp.moveaxis(query, 1, 0), jnp.moveaxis(position, 1, 0)))
    # out: tiles B K T ?, value: tiles B T N.
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(*out.shape[:2], count * size, out.shape[-1])[:, :, :length]
    if value is not None:
        value = jnp.moveaxis(value, 0, 1).reshape(batch, count * size, heads)
        value = value[:, :length]
    return out, value


@in_32_bit
def block_scores_xla(
    operands: Scoring, *, lse: bool = True
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"] | None]:
    """Computes scores and log-sum-exp.

    Without ``lse`` there is no log-sum-exp, and None in its place.
    """
    return _tiled(operands, lse, lambda scores, position: scores)


@in_32_bit
def select_blocks_xla(
    operands: Scoring, *, budget: int, lse: bool = True
) -> tuple[Int[Array, "B K T P"], Float[Array, "B T N"] | None]:
    """Scores and chooses tile by tile; returns the lists and the log-sum-exp."""

    def choose(scores, position):
        own = (position // operands.rule.block_size)[:, None]
        return choose_blocks_xla(scores, own, budget=budget)

    return _tiled(operands, lse, choose)
