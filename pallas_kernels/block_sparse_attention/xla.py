"""Block-sparse causal attention in XLA, forward and backward.

What CPUs run, what GPUs without a Pallas form fall back to, and the backward pass of
every implementation.

Algorithm: queries are cut into tiles. A tile walks over chunks of keys with an online
softmax; all G query heads of a group are rows of one matrix product with the chunk,
so that a chunk of K and V is read once a group.

* Dense: the chunks are consecutive blocks, up to the tile's last position. Capacity
  beyond it costs nothing, the loop length being dynamic.
* Sparse: the chunks are taken from the union of the lists of the tile's tokens, per
  row and kv head, and a per-token mask restores exactly what each token listed.
  Neighbouring tokens list nearly the same blocks, so the union is short.

Backward: the same walk with the saved log-sum-exp; weights are recomputed, nothing of
size T x S is kept.

Non-finite values: a key outside a row's own lists never reaches the row. Logits are
chosen with ``where``. For values, which meet zero weights in a product, a non-finite
value is replaced by 0 and its key by NaN instead: rows that do read it
become NaN, others stay clean.

Measured on 2 shared cores of an AMD EPYC (jax 0.12.0.1, float32, T = 8,192, N = 9,
K = 3, H = 64, blocks of 64): dense 1.14-1.2 s, 65 GFLOP/s of the 100 that such products
reach alone; 16 blocks a token (block 0, 8 local ones, 7 drawn for every 16 tokens)
0.8-0.85 s. When every token draws its own, unions are nearly everything and lists cost
2 to 3 times as much as no lists.

Limits: none on sizes. With a stack of layers, the gradient with respect to ``kv`` has
the shape of the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._common.numerics import (
    NEG_INF,
    cdiv,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
    softmax_finish,
)
from pallas_kernels.block_sparse_attention.operands import Prefill

# Tile sizes for CPUs, where a chunk of K and V and its logits should stay in cache.
DENSE_QUERIES = 256
DENSE_KEYS = 256
# Small tiles keep the union of lists short; a tile still needs rows for the product,
# of which each token gives G.
SPARSE_ROWS = 128
SPARSE_QUERIES_MIN = 16
SPARSE_KEYS = 256


class _Chunk(NamedTuple):
    """Some blocks of keys for every row and kv head (S keys).

    ``place`` is what ``_Walk.add`` needs to put a gradient back.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    bias: Float[Array, "B K S"] | None
    allowed: Bool[Array, "B K T S"]
    place: Array


class _Walk(NamedTuple):
    """The chunks that one tile of queries reads."""

    steps: Int[Array, ""]
    load: Callable[[Int[Array, ""]], _Chunk]
    add: Callable[[Array, Array, Array], Array]


def _dense_walk(operands: Prefill, positions) -> _Walk:
    """Consecutive blocks up to the last position of the tile."""
    kv, key_bias, layer = operands.kv, operands.key_bias, operands.layer
    _, batch, kv_heads, blocks, block, _, head_dim = kv.shape
    size = _chunk_blocks(blocks, block, listed=False)
    span = size * block
    used = jnp.clip(positions.max() + 1, 0, blocks * block)

    def load(step):
        # The last chunk is moved back to stay inside; what it repeats is masked.
        start = jnp.minimum(step * size, blocks - size)

        def take(which):
            part = lax.dynamic_slice(
                kv,
                (layer, 0, 0, start, 0, which, 0),
                (1, batch, kv_heads, size, block, 1, head_dim),
            )
            return part.reshape(batch, kv_heads, span, head_dim)

        bias = None
        if key_bias is not None:
            bias = lax.dynamic_slice(
                key_bias, (layer, 0, 0, start, 0), (1, batch, kv_heads, size, block)
            ).reshape(batch, kv_heads, span)
        key = start * block + jnp.arange(span)
        allowed = (key >= step * span) & (key <= positions[..., None])
        return _Chunk(take(0), take(1), bias, allowed[:, None], start)

    def add(total, update, start):
        part = update.reshape(batch, kv_heads, size, block, *update.shape[3:])
        at = (0, 0, start) + (0,) * (total.ndim - 3)
        old = lax.dynamic_slice(total, at, part.shape)
        return lax.dynamic_update_slice(total, old + part, at)

    return _Walk(cdiv(used, span), load, add)


def _sparse_walk(operands: Prefill, positions, block_indices) -> _Walk:
    """The union of the tile's lists, packed to the front, a few blocks a step."""
    kv, key_bias, layer = operands.kv, operands.key_bias, operands.layer
    _, batch, kv_heads, blocks, block, _, _ = kv.shape
    tokens = block_indices.shape[2]
    size = _chunk_blocks(blocks, block, listed=True)
    row = jnp.arange(batch)[:, None, None]
    head = jnp.arange(kv_heads)[:, None]
    # A block that starts after the token cannot hold a key it may read.
    outside = (block_indices < 0) | (
        block_indices * block > positions[:, None, :, None]
    )
    index = jnp.where(outside, blocks, block_indices)
    member = jnp.zeros((batch, kv_heads, blocks, tokens), bool)
    member = member.at[
        row[..., None], head[..., None], index, jnp.arange(tokens)[:, None]
    ].set(True, mode="drop")
    wanted = member.any(-1)
    # Sorting puts the union first and `blocks`, the mark of no block, after it.
    union = jnp.sort(jnp.where(wanted, jnp.arange(blocks), blocks), -1)
    union = jnp.pad(
        union, ((0, 0), (0, 0), (0, -blocks % size)), constant_values=blocks
    )

    def load(step):
        at = lax.dynamic_slice_in_dim(union, step * size, size, 2)

        def take(x, *tail):
            part = x.at[layer, row, head, at, :, *tail].get(mode="clip")
            return part.reshape(batch, kv_heads, size * block, *part.shape[4:])

        bias = None if key_bias is None else take(key_bias)
        mask = member.at[row, head, at].get(mode="fill", fill_value=False)
        mask = jnp.repeat(jnp.swapaxes(mask, -1, -2), block, -1)
        key = at[..., None] * block + jnp.arange(block)
        key = key.reshape(batch, kv_heads, 1, size * block)
        allowed = mask & (key <= positions[:, None, :, None])
        return _Chunk(take(kv, 0), take(kv, 1), bias, allowed, at)

    def add(total, update, at):
        part = update.reshape(batch, kv_heads, size, block, *update.shape[3:])
        return total.at[row, head, at].add(part, mode="drop")

    return _Walk(cdiv(wanted.sum(-1).max(), size), load, add)


def _walk(operands: Prefill, tile: _Tiles) -> _Walk:
    if tile.block_indices is None:
        return _dense_walk(operands, tile.positions)
    return _sparse_walk(operands, tile.positions, tile.block_indices)


def _logits(query, chunk: _Chunk, scale):
    """Masked logits [B, K, R, S] of the rows (R = T * G), and the clean values."""
    batch, kv_heads, rows, _ = query.shape
    tokens, span = chunk.allowed.shape[2:]
    sound = jnp.isfinite(chunk.values).all(-1)[..., None]
    keys = jnp.where(sound, chunk.keys, jnp.nan)
    logits = scale * einsum_f32("bkrh,bksh->bkrs", query, keys)
    if chunk.bias is not None:
        logits = logits + chunk.bias[:, :, None]
    logits = logits.reshape(batch, kv_heads, tokens, rows // tokens, span)
    logits = jnp.where(chunk.allowed[:, :, :, None], logits, NEG_INF)
    values = jnp.where(sound, chunk.values, 0)
    return logits.reshape(batch, kv_heads, rows, span), values


def _tile_forward(query, walk: _Walk, scale):
    """Output [B, K, R, H] and log-sum-exp [B, K, R] of one tile, float32."""

    def step(i, carry):
        top, total, acc = carry
        chunk = walk.load(i)
        logits, values = _logits(query, chunk, scale)
        new_top = jnp.maximum(top, logits.max(-1))
        shift = finite_or_zero(new_top)
        weights = jnp.exp(logits - shift[..., None])
        fade = jnp.exp(top - shift)
        update = einsum_f32("bkrs,bksh->bkrh", weights.astype(values.dtype), values)
        total = total * fade + weights.sum(-1)
        return new_top, total, acc * fade[..., None] + update

    shape = query.shape[:3]
    start = (jnp.full(shape, NEG_INF), jnp.zeros(shape), jnp.zeros(query.shape))
    top, total, acc = lax.fori_loop(0, walk.steps, step, start)
    return softmax_finish(acc, total, top)


class _Tiles(NamedTuple):
    """Everything a token owns, cut into tiles along a new leading axis."""

    query: Float[Array, "tiles B K R H"]
    positions: Int[Array, "tiles B T"]
    block_indices: Int[Array, "tiles B K T P"] | None


def _cut(x, tokens: int, axis: int, fill):
    """Pads ``axis`` to whole tiles and moves the tile number to the front."""
    count = cdiv(x.shape[axis], tokens)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * tokens - x.shape[axis])
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], count, tokens, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _rows(x, kv_heads: int, tokens: int):
    """[B, T, N, ...] to tiles of rows [tiles, B, K, T * G, ...]."""
    x = _cut(x, tokens, 1, 0)
    count, batch, _, heads = x.shape[:4]
    x = x.reshape(count, batch, tokens, kv_heads, heads // kv_heads, *x.shape[4:])
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(count, batch, kv_heads, -1, *x.shape[5:])


def _unrows(x, tokens: int, length: int):
    """The inverse of ``_rows``, without the padding."""
    count, batch, kv_heads, rows = x.shape[:4]
    x = x.reshape(count, batch, kv_heads, tokens, rows // tokens, *x.shape[4:])
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 3, 2)
    # Now B, tiles, T, K, G, ... .
    x = x.reshape(batch, count * tokens, kv_heads * x.shape[4], *x.shape[5:])
    return x[:, :length]


def _tile_size(length: int, groups: int, listed: bool) -> int:
    """Tokens of a tile of queries."""
    wanted = DENSE_QUERIES
    if listed:
        wanted = max(SPARSE_QUERIES_MIN, SPARSE_ROWS // groups)
    # Tiles of equal size: 300 tokens are 2 x 150, not 256 + 44 padded to 256.
    return cdiv(length, cdiv(length, wanted))


def _chunk_blocks(blocks: int, block: int, listed: bool) -> int:
    """Blocks of a chunk of keys."""
    return max(1, min(blocks, (SPARSE_KEYS if listed else DENSE_KEYS) // block))


def scratch_bytes(
    *,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block: int,
    blocks: int,
    listed: int | None,
    itemsize: int,
) -> int:
    """Device bytes that a forward call needs beside its operands and its result.

    Args:
      batch: B.
      tokens: T.
      heads: N.
      kv_heads: K.
      head_dim: H.
      block: keys of a block.
      blocks: M.
      listed: P, or None for the form without lists.
      itemsize: bytes of a number of ``q`` and ``kv``.

    Returns:
      What the XLA form holds at its widest point: a tile's float32 logits and weights
      against a chunk of keys, the chunk, the running sums, the lists sorted by tile
      and the tiles' outputs before they are put in order. Pallas forms need less.
    """
    tile = _tile_size(tokens, heads // kv_heads, listed is not None)
    keys = _chunk_blocks(blocks, block, listed is not None) * block
    logits = 2 * batch * tile * heads * keys * 4
    chunk = 2 * batch * kv_heads * keys * head_dim * itemsize
    accumulator = batch * tile * heads * head_dim * 4
    lists = 2 * batch * tokens * kv_heads * (listed or 0) * 4
    outputs = batch * tokens * heads * head_dim * itemsize if tile < tokens else 0
    return logits + chunk + accumulator + lists + outputs


def _tiles(operands: Prefill) -> tuple[_Tiles, int]:
    q, block_indices, kv_heads = operands.q, operands.block_indices, operands.kv_heads
    length = q.shape[1]
    listed = block_indices is not None
    tokens = _tile_size(length, q.shape[2] // kv_heads, listed)
    positions = operands.q_start[:, None] + jnp.arange(length)
    lists = None
    if block_indices is not None:
        lists = _cut(block_indices, tokens, 2, -1)
    # Position -1 is before every key: rows of padding read nothing.
    tiles = _Tiles(_rows(q, kv_heads, tokens), _cut(positions, tokens, 1, -1), lists)
    return tiles, tokens


@in_32_bit
def block_sparse_attention_xla(
    operands: Prefill,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp."""
    q = operands.q
    tiles, tokens = _tiles(operands)

    def one(tile: _Tiles):
        walk = _walk(operands, tile)
        out, lse = _tile_forward(tile.query, walk, operands.scale)
        return out.astype(q.dtype), lse

    out, lse = _map(one, tiles)
    length = q.shape[1]
    return _unrows(out, tokens, length), _unrows(lse, tokens, length)


def _map(f, tiles):
    """``lax.map``, without the loop when there is one tile."""
    if tiles.query.shape[0] == 1:
        first = f(jax.tree.map(lambda x: x[0], tiles))
        return tuple(x[None] for x in first)
    return lax.map(f, tiles)


@in_32_bit
def block_sparse_attention_xla_backward(
    operands: Prefill,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B T N"],
) -> dict[str, Array | None]:
    """Gradients with respect to ``q``, ``kv`` and ``key_bias``.

    Args:
      operands: those of the forward pass.
      out: the forward output.
      lse: the forward log-sum-exp.
      d_out: cotangent of ``out``.
      d_lse: cotangent of ``lse``.

    Returns:
      Cotangents by name, in the dtypes and shapes of the operands (or None).
    """
    q, kv, key_bias, layer = operands.q, operands.kv, operands.key_bias, operands.layer
    scale = operands.scale
    _, batch, kv_heads, blocks, block, _, head_dim = kv.shape
    tiles, tokens = _tiles(operands)
    # d logit = weight * (d_out . value - d_out . out + d_lse)
    d_out32 = d_out.astype(jnp.float32)
    lean = d_lse - (d_out32 * out.astype(jnp.float32)).sum(-1)
    extra = (
        _rows(d_out, kv_heads, tokens),
        _rows(finite_or_zero(lse), kv_heads, tokens),
        _rows(lean, kv_heads, tokens),
    )
    shape = (batch, kv_heads, blocks, block)
    totals = (
        jnp.zeros((*shape, head_dim)),
        jnp.zeros((*shape, head_dim)),
        None if key_bias is None else jnp.zeros(shape),
    )

    def one(totals, xs):
        tile, (grad, lse, lean) = xs
        walk = _walk(operands, tile)

        def step(i, carry):
            d_query, (d_keys, d_values, d_bias) = carry
            chunk = walk.load(i)
            logits, values = _logits(tile.query, chunk, scale)
            weights = jnp.exp(logits - lse[..., None])
            d_weights = einsum_f32("bkrh,bksh->bkrs", grad, values)
            d_logits = weights * (d_weights + lean[..., None])
            small = d_logits.astype(q.dtype)
            d_query = d_query + scale * einsum_f32("bkrs,bksh->bkrh", small, chunk.keys)
            d_keys = walk.add(
                d_keys,
                scale * einsum_f32("bkrs,bkrh->bksh", small, tile.query),
                chunk.place,
            )
            d_values = walk.add(
                d_values,
                einsum_f32("bkrs,bkrh->bksh", weights.astype(q.dtype), grad),
                chunk.place,
            )
            if d_bias is not None:
                d_bias = walk.add(d_bias, d_logits.sum(2), chunk.place)
            return d_query, (d_keys, d_values, d_bias)

        start = (jnp.zeros(tile.query.shape), totals)
        d_query, totals = lax.fori_loop(0, walk.steps, step, start)
        return totals, d_query.astype(q.dtype)

    (d_keys, d_values, d_bias), d_query = lax.scan(one, totals, (tiles, extra))
    d_kv = jnp.stack((d_keys, d_values), -2).astype(kv.dtype)
    d_kv = jnp.zeros_like(kv).at[layer].set(d_kv)
    if key_bias is not None:
        d_bias = jnp.zeros_like(key_bias).at[layer].set(d_bias)
    d_q = _unrows(d_query, tokens, q.shape[1])
    return {"q": d_q, "kv": d_kv, "key_bias": d_bias}
