"""Block scores on Mosaic GPU (Hopper: wgmma and TMA).

Three kernels, all with 128 tokens a thread block, 64 a warpgroup:

* ``raw`` (Forecast) scores a tile of tokens against the windows of 64 blocks. The
  compressed keys are first laid out by block: a row holds the windows that touch the
  block side by side, so that one TMA copy a window offset brings the keys at that
  offset of 64 consecutive blocks. The products are then aligned by block, and pooling
  is a maximum in registers. Grid: (token tiles, block tiles, B * K).
* ``lse`` (``mosaic_lse.py``): the log-sum-exp of a head over the visible windows.
* ``softmax`` (own queries), as ``raw``, but the heads of the group come through a ring
  of query tiles; one sum over heads a window offset stays in registers, and masks and
  pooling follow once at the end. Grid as ``raw``.

Blocks in the future of the whole tile are filled without a product. The last two have
a third warpgroup that issues copies.

Shared memory for H = 128, 32/16 windows and blocks of 64: 112 KiB (raw), 161 KiB (lse),
177 KiB (softmax).

Measured on one H200 (jax 0.11.2, bfloat16, T = 131,072, M = 2,048, K = 2, H = 128,
P = 96; durations in a profile, spread at most 0.1 %): Forecast scores 1.96 ms (Triton:
1.58), scores and choice 26.7 ms (6.31), nearly all of it XLA's top-k. Own queries of
32 heads: scores 23.9 ms (Triton: 62.0), scores and choice 50.7 ms (64.5).

Limits: bfloat16 or float16; H a multiple of 64, 128 at most with windows of 32/16. The
choice of blocks is XLA's top-k. Laying out the keys copies the layer's once, which
suits prefill, not decode.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._common.mosaic import (
    SHARED_BYTES,
    WARPGROUP_ROWS,
    fill_and_refill,
    operand_transforms,
    require_mosaic_sizes,
)
from pallas_kernels._common.numerics import LOG2_E, NEG_INF, cdiv, in_32_bit
from pallas_kernels.block_scores.mosaic_lse import log_sum_exp
from pallas_kernels.block_scores.mosaic_tiles import (
    BLOCKS,
    COMPUTE,
    TOKENS,
    Keys,
    lay_out,
    product,
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
from pallas_kernels.choose_blocks.api import choose_blocks

QUERY_STAGES = 2  # of the ring of query tiles of the softmax kernel


class _Tile:
    """Where a thread block of the scoring kernels stands."""

    def __init__(self, refs, rule: Rule, kv_heads: int, windows: int):
        self.rule = rule
        names = ("tile", "block", "pair")
        self.tile, block_tile, self.pair = (lax.axis_index(n) for n in names)
        b = lax.div(self.pair, jnp.int32(kv_heads))
        self.first = refs["start"][b] + self.tile * TOKENS
        self.count = jnp.minimum(refs["count"][b], windows)
        self.first_block = block_tile * BLOCKS
        self.wg = lax.axis_index("wg")
        self.reached = jnp.bool_(True)
        if rule.mask_future_blocks:
            start = self.first_block * rule.block_size
            self.reached = start <= self.first + (TOKENS - 1)

    shape = (WARPGROUP_ROWS, BLOCKS)

    def fetch_keys(self, keys_ref, k_smem, k_ready, head_dim: int, rows: int):
        """Starts the copies of all window offsets."""
        row = pl.multiple_of(self.pair * rows + self.first_block, 8)
        for i in range(self.rule.offsets):
            plgpu.copy_gmem_to_smem(
                keys_ref.at[pl.ds(row, BLOCKS), pl.ds(i * head_dim, head_dim)],
                k_smem.at[i],
                k_ready,
            )

    def places(self):
        """Position of each row and block of each column."""

        def iota(dimension):
            return plgpu.broadcasted_iota(
                jnp.int32, self.shape, dimension, layout=plgpu.Layout.WGMMA
            )

        position = self.first + self.wg * WARPGROUP_ROWS + iota(0)
        return position, self.first_block + iota(1)

    def filled(self, value: float):
        """A tile of one value."""
        tile = jnp.full(self.shape, value, jnp.float32)
        return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)

    def seen(self, i: int, position, block):
        """Whether a row sees its column's window at offset ``i``; if there is one."""
        window = block * self.rule.per_block + (i - self.rule.before)
        exists = (window >= 0) & (window < self.count)
        return self.rule.visible(window, position) & exists, exists

    def write(self, out_ref, out_smem, tiles: int):
        """Writes the warpgroup's tile of scores."""
        row = (self.pair * tiles + self.tile) * TOKENS + self.wg * WARPGROUP_ROWS
        plgpu.copy_smem_to_gmem(
            out_smem.at[self.wg],
            out_ref.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(self.first_block, BLOCKS)],
        )
        plgpu.wait_smem_to_gmem(0)


def _raw_body(refs, scoped, *, rule: Rule, head_dim: int, kv_heads: int, sizes):
    q_smem, k_smem, out_smem, q_ready, k_ready = scoped
    rows_per_pair, tiles, windows = sizes
    at = _Tile(refs, rule, kv_heads, windows)
    wg = at.wg

    @pl.when(at.reached & (wg == 0))
    def _fetch_keys():
        at.fetch_keys(refs["keys"], k_smem, k_ready, head_dim, rows_per_pair)

    def finish(pooled, position, block):
        out_smem[wg] = rule.force(pooled, block, position)
        plgpu.commit_smem()

    @pl.when(at.reached)
    def _score():
        row = (at.pair * tiles + at.tile) * TOKENS + wg * WARPGROUP_ROWS
        rows = pl.ds(pl.multiple_of(row, 8), WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(refs["query"].at[rows], q_smem.at[wg], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        plgpu.barrier_wait(k_ready)
        position, block = at.places()
        pooled = at.filled(NEG_INF)
        for i in range(rule.offsets):
            scores = product(q_smem.at[wg], k_smem.at[i], BLOCKS) * rule.scale
            seen, _ = at.seen(i, position, block)
            pooled = jnp.maximum(pooled, jnp.where(seen, scores, NEG_INF))
        finish(pooled, position, block)

    @pl.when(jnp.logical_not(at.reached))
    def _fill():
        finish(at.filled(NEG_INF), *at.places())

    at.write(refs["out"], out_smem, tiles)


def _softmax_body(
    refs, scoped, *, rule: Rule, head_dim: int, kv_heads: int, groups: int, sizes
):
    q_smem, lse_smem, k_smem, out_smem, q_ready, q_done, k_ready = scoped
    rows_per_pair, tiles, windows = sizes
    at = _Tile(refs, rule, kv_heads, windows)
    heads = jnp.where(at.reached, groups, 0)

    @pl.when(at.wg == COMPUTE)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")

        @pl.when(at.reached)
        def _fetch_keys():
            at.fetch_keys(refs["keys"], k_smem, k_ready, head_dim, rows_per_pair)

        def fetch(head, stage):
            row = ((at.pair * groups + head) * tiles + at.tile) * TOKENS
            for part in range(COMPUTE):
                start = pl.multiple_of(row + part * WARPGROUP_ROWS, 8)
                rows = pl.ds(start, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(
                    refs["query"].at[rows], q_smem.at[stage, part], q_ready.at[stage]
                )
                plgpu.copy_gmem_to_smem(
                    refs["lse"].at[rows], lse_smem.at[stage, part], q_ready.at[stage]
                )

        fill_and_refill(fetch, heads, QUERY_STAGES, (q_done,))

    @pl.when(at.wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        @pl.when(at.reached)
        def _wait_for_keys():
            plgpu.barrier_wait(k_ready)

        def head_body(head, totals):
            stage = lax.rem(head, jnp.int32(QUERY_STAGES))
            plgpu.barrier_wait(q_ready.at[stage])
            lse = plgpu.load(
                lse_smem.at[stage, at.wg], layout=plgpu.Layout.WGMMA.reduce(1)
            )
            lse = jnp.where(lse == NEG_INF, 0.0, lse * LOG2_E)
            shift = lax.broadcast_in_dim(lse, at.shape, [0])
            totals = list(totals)
            for i in range(rule.offsets):
                logits = product(q_smem.at[stage, at.wg], k_smem.at[i], BLOCKS)
                totals[i] += jnp.exp2(logits * (rule.scale * LOG2_E) - shift)
            plgpu.barrier_arrive(q_done.at[stage])
            return tuple(totals)

        totals = tuple(at.filled(0.0) for _ in range(rule.offsets))
        totals = lax.fori_loop(0, heads, head_body, totals)
        position, block = at.places()
        pooled = at.filled(NEG_INF)
        for i, total in enumerate(totals):
            seen, exists = at.seen(i, position, block)
            weight = jnp.where(seen, total, 0.0)
            pooled = jnp.maximum(pooled, jnp.where(exists, weight, NEG_INF))
        # A tile that was not reached lies in the future: the rule makes it -inf.
        out_smem[at.wg] = rule.force(pooled, block, position)
        plgpu.commit_smem()
        at.write(refs["out"], out_smem, tiles)


def _laid_out(operands: Scoring) -> Keys:
    """The layer's keys in the kernels' order, of a call that they serve."""
    rule, head_dim = operands.rule, operands.head_dim
    if rule.scale <= 0:
        raise NotImplementedError(f"mosaic_gpu needs a positive scale: {rule.scale}")
    require_mosaic_sizes(operands.query.dtype, head_dim, 64)
    if operands.compressed_keys.shape[3] < 1:
        raise NotImplementedError("mosaic_gpu needs at least one window")
    stages = QUERY_STAGES if rule.softmax else 1
    needed = 2 * head_dim * (stages * TOKENS + rule.offsets * BLOCKS)
    needed += 4 * TOKENS * BLOCKS
    if rule.before > rule.per_block or needed > SHARED_BYTES - 4096:
        raise NotImplementedError(
            f"mosaic_gpu has no room for {rule.offsets} window offsets of head dim "
            f"{head_dim} in 227 KiB of shared memory"
        )
    return lay_out(operands.compressed_keys, operands.layer, rule)


def _call(operands: Scoring, keys: Keys, lse: bool):
    """Scores [B, K, T, M] and log-sum-exp [B, T, N] (None unless asked or needed)."""
    query, rule, kv_heads = operands.query, operands.rule, operands.kv_heads
    batch, length, _, head_dim = query.shape
    grouped = by_head(query, kv_heads, TOKENS)
    groups, padded = grouped.shape[2:4]
    tiles, block_tiles = padded // TOKENS, cdiv(rule.blocks, BLOCKS)
    found = None
    if lse or rule.softmax:
        found = log_sum_exp(grouped, keys, operands)
    inputs = {
        "start": operands.q_start,
        "count": operands.num_windows,
        "query": grouped.reshape(-1, head_dim),
        "keys": keys.by_block,
    }
    tiled = operand_transforms()
    query_tile = (COMPUTE, WARPGROUP_ROWS, head_dim)
    static = {
        "rule": rule,
        "head_dim": head_dim,
        "kv_heads": kv_heads,
        "sizes": (block_tiles * BLOCKS, tiles, keys.windows),
    }
    keys_and_scores = (
        plgpu.SMEM((rule.offsets, BLOCKS, head_dim), query.dtype, transforms=tiled),
        plgpu.SMEM((COMPUTE, WARPGROUP_ROWS, BLOCKS), jnp.float32),
    )
    if rule.softmax:
        assert found is not None
        inputs["lse"] = found.reshape(-1)
        body = functools.partial(_softmax_body, groups=groups, **static)
        scratch = (
            plgpu.SMEM((QUERY_STAGES, *query_tile), query.dtype, transforms=tiled),
            plgpu.SMEM((QUERY_STAGES, COMPUTE, WARPGROUP_ROWS), jnp.float32),
            *keys_and_scores,
            plgpu.Barrier(num_arrivals=2 * COMPUTE, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=rule.offsets),
        )
    else:
        body = functools.partial(_raw_body, **static)
        scratch = (
            plgpu.SMEM(query_tile, query.dtype, transforms=tiled),
            *keys_and_scores,
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=rule.offsets),
        )
    names = (*inputs, "out")

    def block_scores_mosaic_gpu(*refs):
        pl.run_scoped(
            lambda *scoped: body(dict(zip(names, refs, strict=True)), scoped),
            *scratch,
            collective_axes="wg",
        )

    rows = batch * kv_heads * padded
    out = plgpu.kernel(
        block_scores_mosaic_gpu,
        out_type=jax.ShapeDtypeStruct((rows, block_tiles * BLOCKS), jnp.float32),
        grid=(tiles, block_tiles, batch * kv_heads),
        grid_names=("tile", "block", "pair"),
        num_threads=COMPUTE + 1 if rule.softmax else COMPUTE,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    out = out.reshape(batch, kv_heads, padded, block_tiles * BLOCKS)
    out = out[:, :, :length, : rule.blocks]
    return out, None if found is None else by_token(found, length)


@in_32_bit
def block_scores_mosaic_gpu(
    operands: Scoring, *, lse: bool = True
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"] | None]:
    """Computes scores and log-sum-exp.

    Raises:
      NotImplementedError: for sizes or dtypes that the kernels cannot tile, or without
        a Hopper device.
    """
    return _call(operands, _laid_out(operands), lse)


@in_32_bit
def select_blocks_mosaic_gpu(
    operands: Scoring, *, budget: int, lse: bool = False, slab: int | None = None
) -> Chosen:
    """Scores and chooses slab by slab.

    Args:
      operands: queries, keys and the rule.
      budget: how many blocks each query lists.
      lse: whether to return the log-sum-exp.
      slab: tokens scored at a time.

    Returns:
      The lists, and the log-sum-exp (None in the raw form unless asked for).

    Raises:
      NotImplementedError: as ``block_scores_mosaic_gpu``.
    """
    keys = _laid_out(operands)

    def one(part: Scoring):
        scores, found = _call(part, keys, lse)
        # Mosaic makes the scores; who chooses is what the device's record says.
        return choose_blocks(scores, own_blocks(part), budget=budget), found

    return over_slabs(operands, TOKENS, slab, one)
