"""Block scores and the choice on Triton (compute capability 8.0 and newer).

Three kernels:

* ``scores``, grid (token tiles, block tiles, B * K): a program scores a tile of tokens
  against the windows of a tile of blocks and pools in registers. The windows of a
  block lie ``per_block`` apart, so that one product a window offset (those in the
  block and the ones before it) gives scores that are already aligned by block; pooling
  is a maximum of those tiles. In the softmax form the tile is the sum over the G heads
  of exp(logit - lse). Tiles wholly in the future are filled without a product.
* ``lse``, grid (token tiles, N, B): the log-sum-exp of each head over the visible
  windows, the first pass of the softmax form.
* ``choose_blocks``: the choice, which is an operation of its own.

``select_blocks`` runs them over slabs of tokens, so that scores of blocks exist for
one slab only.

Measured on one H200 (jax 0.11.2, bfloat16, T = 131,072, W = 8,191, M = 2,048, K = 2,
H = 128, P = 96; durations in a profile, spread at most 0.1 %): Forecast scores
1.58 ms, scores and choice 6.31 ms; own queries of 32 heads, scores and choice,
64.5 ms, so that Forecast is 10.2 times as fast (8.0 against Mosaic's 50.7 ms).

Limits: H a power of two from 16 to 256. The back end is deprecated in JAX; this file
can be deleted with it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import NEG_INF, cdiv, finite_or_zero, in_32_bit
from pallas_kernels._common.triton import (
    MIN_ROWS,
    dot,
    launch,
    next_power_of_two,
    require_launch,
    require_triton_sizes,
)
from pallas_kernels.block_scores.operands import Scoring
from pallas_kernels.block_scores.rule import Rule
from pallas_kernels.block_scores.slabs import (
    Chosen,
    by_head,
    by_token,
    over_slabs,
    own_blocks,
)
from pallas_kernels.choose_blocks.pallas_triton import choose_blocks_triton
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config:
    """Settings of the kernels.

    Attributes:
      tokens: tokens of a tile, a power of two from 16.
      blocks: blocks of a tile, a power of two from 16.
      num_warps: warps of a program.
      num_stages: depth of the load pipeline.
    """

    tokens: int = 64
    blocks: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("tokens", "blocks"):
            value = getattr(self, name)
            if value < MIN_ROWS or value & (value - 1):
                raise ValueError(f"{name} is {value}; it must be a power of two >= 16")
        require_launch(self.num_warps, self.num_stages)


def config_for(groups: int, head_dim: int) -> Config:
    """The recorded settings of this device kind, or the defaults."""
    found = tuned_config("block_scores", "triton", {"G": groups, "H": head_dim})
    return Config(**found) if found else Config(num_warps=4 if groups == 1 else 8)


def _load_keys(keys_ref, sizes, layer, pair, window, count):
    """Keys [windows, H] of ``window``, zeros outside 0 .. count, and what is inside.

    ``keys_ref`` is flat: rows of a stride are one array of offsets.
    """
    pairs, windows, head_dim = sizes
    inside = (window >= 0) & (window < count)
    row = (layer * pairs + pair) * windows + jnp.clip(window, 0, windows - 1)
    offset = row[:, None] * head_dim + jnp.arange(head_dim)[None]
    mask = jnp.broadcast_to(inside[:, None], offset.shape)
    return plt.load(keys_ref.at[offset], mask=mask, other=0.0), inside


def _scores_kernel(
    layer_ref,  # [1]
    start_ref,  # [B]
    count_ref,  # [B]
    query_ref,  # [B, K, G, T, H]
    keys_ref,  # [L B K W H]
    lse_ref,  # [B, K, G, T] or None
    out_ref,  # [B, K, T, M]
    *,
    rule: Rule,
    config: Config,
    sizes: tuple[int, int, int],
):
    tile, block_tile, pair = (pl.program_id(i) for i in range(3))
    kv_heads, groups, _, _ = query_ref.shape[1:]
    b, k = pair // kv_heads, pair % kv_heads
    tokens = pl.ds(tile * config.tokens, config.tokens)
    position = start_ref[b] + tile * config.tokens + jnp.arange(config.tokens)
    block = block_tile * config.blocks + jnp.arange(config.blocks)
    count = jnp.minimum(count_ref[b], sizes[1])
    last = start_ref[b] + (tile + 1) * config.tokens - 1
    shape = (config.tokens, config.blocks)

    def offset_scores(i, pooled):
        window = block * rule.per_block + (i - rule.before)
        keys, exists = _load_keys(keys_ref, sizes, layer_ref[0], pair, window, count)
        seen = rule.visible(window[None], position[:, None]) & exists[None]
        # dot wants its right operand as [H, blocks].
        if rule.softmax:

            def head(g, total):
                logits = dot(query_ref[b, k, g, tokens, :], keys.T) * rule.scale
                lse = finite_or_zero(lse_ref[b, k, g, tokens])
                weights = jnp.exp(logits - lse[:, None])
                return total + jnp.where(seen, weights, 0.0)

            scores = lax.fori_loop(0, groups, head, jnp.zeros(shape, jnp.float32))
            scores = jnp.where(exists[None], scores, NEG_INF)
        else:
            scores = dot(query_ref[b, k, 0, tokens, :], keys.T) * rule.scale
            scores = jnp.where(seen, scores, NEG_INF)
        return jnp.maximum(pooled, scores)

    nothing = jnp.full(shape, NEG_INF, jnp.float32)

    def all_offsets():
        return lax.fori_loop(0, rule.before + rule.per_block, offset_scores, nothing)

    if rule.mask_future_blocks:
        reached = block_tile * config.blocks * rule.block_size <= last
        pooled = lax.cond(reached, all_offsets, lambda: nothing)
    else:
        pooled = all_offsets()
    pooled = rule.force(pooled, block[None], position[:, None])
    out_ref[b, k, tokens, pl.ds(block_tile * config.blocks, config.blocks)] = pooled


def _lse_kernel(
    layer_ref,  # [1]
    start_ref,  # [B]
    count_ref,  # [B]
    query_ref,  # [B, K, G, T, H]
    keys_ref,  # [L B K W H]
    lse_ref,  # [B, K, G, T]
    *,
    rule: Rule,
    config: Config,
    sizes: tuple[int, int, int],
):
    tile, head, b = (pl.program_id(i) for i in range(3))
    kv_heads, groups = query_ref.shape[1:3]
    k, g = head // groups, head % groups
    tokens = pl.ds(tile * config.tokens, config.tokens)
    position = start_ref[b] + tile * config.tokens + jnp.arange(config.tokens)
    last = start_ref[b] + (tile + 1) * config.tokens - 1
    query = query_ref[b, k, g, tokens, :]
    reach = rule.kernel_size - 1 if rule.softmax else 0
    visible = jnp.maximum(last - reach, -1) // rule.kernel_stride + 1
    count = jnp.minimum(count_ref[b], sizes[1])
    steps = cdiv(jnp.clip(visible, 0, count), config.blocks)

    def body(step, carry):
        top, total = carry
        window = step * config.blocks + jnp.arange(config.blocks)
        pair = b * kv_heads + k
        keys, exists = _load_keys(keys_ref, sizes, layer_ref[0], pair, window, count)
        logits = dot(query, keys.T) * rule.scale
        seen = rule.visible(window[None], position[:, None]) & exists[None]
        logits = jnp.where(seen, logits, NEG_INF)
        new_top = jnp.maximum(top, logits.max(1))
        shift = finite_or_zero(new_top)
        total = total * jnp.exp(top - shift)
        return new_top, total + jnp.exp(logits - shift[:, None]).sum(1)

    start = (
        jnp.full((config.tokens,), NEG_INF, jnp.float32),
        jnp.zeros((config.tokens,), jnp.float32),
    )
    top, total = lax.fori_loop(0, steps, body, start)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse_ref[b, k, g, tokens] = jnp.where(empty, NEG_INF, top + jnp.log(total))


def _call(operands: Scoring, *, config: Config, interpret: bool, lse: bool):
    """Scores [B, K, T, M] and log-sum-exp [B, T, N] (None unless asked or needed)."""
    query, keys, rule = operands.query, operands.compressed_keys, operands.rule
    batch, length, heads, head_dim = query.shape
    kv_heads, windows = keys.shape[2:4]
    if keys.size >= 2**31:
        raise NotImplementedError(
            f"triton scores compressed_keys of fewer than 2**31 elements, not "
            f"{tuple(keys.shape)}"
        )
    tokens = min(config.tokens, max(MIN_ROWS, next_power_of_two(length)))
    tile = min(config.blocks, max(MIN_ROWS, next_power_of_two(rule.blocks)))
    config = Config(tokens, tile, config.num_warps, config.num_stages)
    grouped = by_head(query, kv_heads, tokens)
    padded = grouped.shape[3]
    block_tiles = cdiv(rule.blocks, tile)
    static = {
        "rule": rule,
        "config": config,
        "sizes": (batch * kv_heads, windows, head_dim),
    }
    inputs = (
        operands.layer.reshape(1),
        operands.q_start,
        operands.num_windows,
        grouped,
        keys.reshape(-1),
    )
    found = None
    if lse or rule.softmax:
        found = launch(
            functools.partial(_lse_kernel, **static),
            *inputs,
            grid=(padded // tokens, heads, batch),
            out_shape=jax.ShapeDtypeStruct(grouped.shape[:-1], jnp.float32),
            config=config,
            interpret=interpret,
            name="block_scores_lse_triton",
        )
    shape = (batch, kv_heads, padded, block_tiles * tile)
    scores = launch(
        functools.partial(_scores_kernel, **static),
        *inputs,
        found if rule.softmax else None,
        grid=(padded // tokens, block_tiles, batch * kv_heads),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        config=config,
        interpret=interpret,
        name="block_scores_triton",
    )
    scores = scores[:, :, :length, : rule.blocks]
    if found is not None:
        found = by_token(found, length)
    return scores, found


@in_32_bit
def block_scores_triton(
    operands: Scoring,
    *,
    config: Config | None = None,
    interpret: bool = False,
    lse: bool = True,
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"] | None]:
    """Computes scores and log-sum-exp.

    Raises:
      NotImplementedError: for sizes Triton cannot tile, or without a CUDA device.
    """
    config = _served(operands, config, interpret)
    return _call(operands, config=config, interpret=interpret, lse=lse)


def _served(operands: Scoring, config: Config | None, interpret: bool) -> Config:
    """The settings of a call that Triton takes: recorded or default ones if None."""
    head_dim = operands.head_dim
    require_triton_sizes(operands.query.dtype, head_dim, 64, interpret)
    return config or config_for(operands.groups, head_dim)


@in_32_bit
def select_blocks_triton(
    operands: Scoring,
    *,
    budget: int,
    config: Config | None = None,
    interpret: bool = False,
    lse: bool = True,
    slab: int | None = None,
) -> Chosen:
    """Scores and chooses slab by slab; returns the lists and the log-sum-exp.

    Args:
      operands: queries, keys and the rule.
      budget: how many blocks each query lists.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.
      lse: compute the log-sum-exp in the raw form too.
      slab: tokens scored at a time.

    Returns:
      Lists and log-sum-exp.

    Raises:
      NotImplementedError: for sizes Triton cannot tile, or without a CUDA device.
    """
    config = _served(operands, config, interpret)

    def one(part: Scoring):
        scores, found = _call(part, config=config, interpret=interpret, lse=lse)
        own = own_blocks(part)
        lists = choose_blocks_triton(scores, own, budget=budget, interpret=interpret)
        return lists, found

    return over_slabs(operands, config.tokens, slab, one)
