"""The Mosaic GPU kernel of the log-sum-exp of each head over its visible windows.

An online softmax without values, over a ring of 128 windows a stage; a third warpgroup
issues copies. Grid: (token tiles, N, B).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._common.mosaic import (
    LOWEST,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    fill_and_refill,
    operand_transforms,
)
from pallas_kernels._common.numerics import LN_2, LOG2_E, NEG_INF
from pallas_kernels.block_scores.mosaic_tiles import COMPUTE, TOKENS, Keys, product
from pallas_kernels.block_scores.operands import Scoring
from pallas_kernels.block_scores.rule import Rule


def _lse_body(refs, scoped, *, rule: Rule, stages: int, keys: int, sizes):
    q_smem, k_smem, lse_smem, q_ready, k_ready, k_done = scoped
    kv_heads, groups, tiles, windows = sizes
    tile, head, b = (lax.axis_index(n) for n in ("tile", "head", "b"))
    wg = lax.axis_index("wg")
    pair = b * kv_heads + lax.div(head, jnp.int32(groups))
    first = refs["start"][b] + tile * TOKENS
    count = jnp.minimum(refs["count"][b], windows)
    reach = rule.kernel_size - 1 if rule.softmax else 0
    visible = jnp.maximum(first + (TOKENS - 1) - reach + rule.kernel_stride, 0)
    visible = jnp.clip(lax.div(visible, jnp.int32(rule.kernel_stride)), 0, count)
    steps = lax.div(visible + (keys - 1), jnp.int32(keys))

    @pl.when(wg == COMPUTE)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(step, stage):
            # What lies beyond the windows arrives as zeros and is masked.
            plgpu.copy_gmem_to_smem(
                refs["keys"].at[pair, pl.ds(step * keys, keys)],
                k_smem.at[stage],
                k_ready.at[stage],
            )

        fill_and_refill(fetch, steps, stages, (k_done,))

    @pl.when(wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        row = ((b * (kv_heads * groups) + head) * tiles + tile) * TOKENS
        rows = pl.ds(
            pl.multiple_of(row + wg * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS
        )
        plgpu.copy_gmem_to_smem(refs["query"].at[rows], q_smem.at[wg], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        shape = (WARPGROUP_ROWS, keys)
        my_first = first + wg * WARPGROUP_ROWS

        def iota(dimension):
            return plgpu.broadcasted_iota(
                jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA
            )

        def mask(logits, start):
            window = start + iota(1)
            seen = rule.visible(window, my_first + iota(0)) & (window < count)
            return jnp.where(seen, logits, NEG_INF)

        def step_body(step, carry):
            top, total = carry
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(k_ready.at[stage])
            logits = product(q_smem.at[wg], k_smem.at[stage], keys)
            plgpu.barrier_arrive(k_done.at[stage])
            logits = logits * (rule.scale * LOG2_E)
            last = step * keys + (keys - 1)
            whole = (last < count) & (last * rule.kernel_stride + reach <= my_first)
            logits = lax.cond(whole, lambda x, _: x, mask, logits, step * keys)
            new_top = jnp.maximum(top, logits.max(axis=1))
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, shape, [0]))
            return new_top, total * jnp.exp2(top - new_top) + weights.sum(axis=1)

        def filled(value):
            rows = jnp.full((WARPGROUP_ROWS,), value, jnp.float32)
            return plgpu.layout_cast(rows, plgpu.Layout.WGMMA.reduce(1))

        start = (filled(LOWEST), filled(0.0))
        top, total = lax.fori_loop(0, steps, step_body, start)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse_smem[wg] = jnp.where(empty, NEG_INF, top * LN_2 + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], refs["lse"].at[rows])
        plgpu.wait_smem_to_gmem(0)


def log_sum_exp(query, keys: Keys, operands: Scoring):
    """Log-sum-exp [B, K, G, padded T] of queries by head."""
    batch, kv_heads, groups, padded, head_dim = query.shape
    columns = 128 if head_dim <= 128 else 64
    room = (SHARED_BYTES - 8192) // (2 * head_dim) - TOKENS
    stages = min(4, room // columns)
    tiles = padded // TOKENS
    names = ("start", "count", "query", "keys", "lse")

    def block_scores_lse_mosaic_gpu(*refs):
        tiled = operand_transforms()
        pl.run_scoped(
            lambda *scoped: _lse_body(
                dict(zip(names, refs, strict=True)),
                scoped,
                rule=operands.rule,
                stages=stages,
                keys=columns,
                sizes=(kv_heads, groups, tiles, keys.windows),
            ),
            plgpu.SMEM(
                (COMPUTE, WARPGROUP_ROWS, head_dim), query.dtype, transforms=tiled
            ),
            plgpu.SMEM((stages, columns, head_dim), query.dtype, transforms=tiled),
            plgpu.SMEM((COMPUTE, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            collective_axes="wg",
        )

    lse = plgpu.kernel(
        block_scores_lse_mosaic_gpu,
        out_type=jax.ShapeDtypeStruct((query.size // head_dim,), jnp.float32),
        grid=(tiles, kv_heads * groups, batch),
        grid_names=("tile", "head", "b"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        operands.q_start,
        operands.num_windows,
        query.reshape(-1, head_dim),
        keys.by_window,
    )
    return lse.reshape(query.shape[:-1])
