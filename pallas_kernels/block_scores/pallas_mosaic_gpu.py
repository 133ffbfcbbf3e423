"""Block scores on Mosaic GPU (Hopper: wgmma and TMA), the raw (Forecast) form.

Algorithm: a thread block scores 128 tokens (64 a warpgroup) against the windows of 64
blocks. The compressed keys are first laid out by block: a row holds the windows that
touch the block side by side, so that one TMA copy a window offset brings the keys at
that offset of 64 consecutive blocks. The products are then aligned by block, and
pooling is a maximum in registers. Blocks in
the future of the whole tile are filled without a product. Grid: (token tiles, block
tiles, B * K); tiles are independent, two thread blocks a multiprocessor overlap copies
with products.

Shared memory: 128 x H queries and one 64 x H tile an offset (5 for 32/16 windows and
blocks of 64), 112 KiB for H = 128.

Measured on one H200 (jax 0.11.2, bfloat16, T = 131,072, M = 2,048, K = 2, H = 128,
P = 96; median of 5): scores 2.43 ms ±2.3 % (Triton: 1.93), scores and choice 27.6 ms
±0.2 %, nearly all of it XLA's top-k; Triton's choice is what a long prefill wants.

Limits: the raw form without log-sum-exp (the softmax form is Triton's or XLA's);
bfloat16 or float16; H a multiple of 64 up to 256. The choice of blocks is XLA's top-k.
Laying out the keys copies the layer's once, which
suits prefill, not decode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels._common.dispatch import in_32_bit
from pallas_kernels._common.mosaic import (
    SHARED_BYTES,
    WARPGROUP_ROWS,
    operand_transforms,
    require_mosaic_sizes,
)
from pallas_kernels._common.numerics import NEG_INF, cdiv
from pallas_kernels.block_scores.rule import Rule
from pallas_kernels.block_scores.xla import choose_xla

COMPUTE = 2  # warpgroups
TOKENS = COMPUTE * WARPGROUP_ROWS
BLOCKS = 64
# Scores of one slab of select_blocks: tokens x kv heads x blocks.
SLAB_SCORES = 16 * 2**20


def _body(refs, scoped, *, rule: Rule, head_dim: int, kv_heads: int, sizes):
    q_smem, k_smem, out_smem, q_ready, k_ready = scoped
    rows_per_pair, tiles, windows = sizes
    tile, block_tile, pair = (lax.axis_index(n) for n in ("tile", "block", "pair"))
    wg = lax.axis_index("wg")
    b = lax.div(pair, jnp.int32(kv_heads))
    first = refs["start"][b] + tile * TOKENS
    count = jnp.minimum(refs["count"][b], windows)
    first_block = block_tile * BLOCKS
    shape = (WARPGROUP_ROWS, BLOCKS)
    reached = first_block * rule.block_size <= first + (TOKENS - 1)
    if not rule.mask_future_blocks:
        reached = jnp.bool_(True)

    @pl.when(reached & (wg == 0))
    def _fetch_keys():
        for i in range(rule.before + rule.per_block):
            row = pl.multiple_of(pair * rows_per_pair + first_block, 8)
            plgpu.copy_gmem_to_smem(
                refs["keys"].at[pl.ds(row, BLOCKS), pl.ds(i * head_dim, head_dim)],
                k_smem.at[i],
                k_ready,
            )

    def iota(dimension):
        return plgpu.broadcasted_iota(
            jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA
        )

    part = out_smem.at[wg]

    def start():
        nothing = jnp.full(shape, NEG_INF, jnp.float32)
        position = first + wg * WARPGROUP_ROWS + iota(0)
        nothing = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
        return nothing, position, first_block + iota(1)

    def finish(pooled, position, block):
        part[...] = rule.force(pooled, block, position)
        plgpu.commit_smem()

    @pl.when(reached)
    def _score():
        row = (pair * tiles + tile) * TOKENS + wg * WARPGROUP_ROWS
        rows = pl.ds(pl.multiple_of(row, 8), WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(refs["query"].at[rows], q_smem.at[wg], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        plgpu.barrier_wait(k_ready)
        pooled, position, block = start()
        for i in range(rule.before + rule.per_block):

            def product(acc_ref, i=i):
                plgpu.wgmma(acc_ref, q_smem.at[wg], k_smem.at[i].transpose((1, 0)))
                return acc_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            window = block * rule.per_block + (i - rule.before)
            seen = rule.visible(window, position) & (window >= 0) & (window < count)
            pooled = jnp.maximum(pooled, jnp.where(seen, scores * rule.scale, NEG_INF))
        finish(pooled, position, block)

    @pl.when(jnp.logical_not(reached))
    def _fill():
        finish(*start())

    row = (pair * tiles + tile) * TOKENS + wg * WARPGROUP_ROWS
    plgpu.copy_smem_to_gmem(
        part, refs["out"].at[pl.ds(row, WARPGROUP_ROWS), pl.ds(first_block, BLOCKS)]
    )
    plgpu.wait_smem_to_gmem(0)


def _keys_by_block(compressed_keys, layer, rule: Rule, block_tiles: int):
    """[B * K * rows, offsets * H]: for each block the keys of its windows."""
    keys = compressed_keys[layer]
    batch, kv_heads = keys.shape[:2]
    rows = block_tiles * BLOCKS
    keys = keys[:, :, : rows * rule.per_block]
    after = rows * rule.per_block - keys.shape[2]
    keys = jnp.pad(keys, ((0, 0), (0, 0), (rule.before, after), (0, 0)))
    parts = [
        keys[:, :, i :: rule.per_block][:, :, :rows]
        for i in range(rule.before + rule.per_block)
    ]
    return jnp.concatenate(parts, -1).reshape(batch * kv_heads * rows, -1)


def _check(query, rule: Rule) -> None:
    """Refuses what the kernel does not serve."""
    if rule.softmax:
        raise NotImplementedError(
            "mosaic_gpu scores the raw form only; the softmax form needs two passes "
            "over the windows (triton and xla have it)"
        )
    if rule.scale <= 0:
        raise NotImplementedError(f"mosaic_gpu needs a positive scale: {rule.scale}")
    head_dim = query.shape[-1]
    require_mosaic_sizes(query.dtype, head_dim, 64)
    offsets = rule.before + rule.per_block
    needed = 2 * head_dim * (TOKENS + offsets * BLOCKS) + 4 * TOKENS * BLOCKS
    if rule.before > rule.per_block or needed > SHARED_BYTES - 4096:
        raise NotImplementedError(
            f"mosaic_gpu has no room for {offsets} window offsets of head dim "
            f"{head_dim} in 227 KiB of shared memory"
        )


def _call(query, keys, q_start, num_windows, windows, rule: Rule):
    """Scores [B, K, T, M] of queries against keys by block."""
    batch, length, kv_heads, head_dim = query.shape
    tiles, block_tiles = cdiv(length, TOKENS), cdiv(rule.blocks, BLOCKS)
    grow = ((0, 0), (0, 0), (0, tiles * TOKENS - length), (0, 0))
    flat = jnp.pad(jnp.moveaxis(query, 2, 1), grow).reshape(-1, head_dim)
    names = ("start", "count", "query", "keys", "out")
    offsets = rule.before + rule.per_block

    def block_scores_mosaic_gpu(*refs):
        tiled = operand_transforms()
        pl.run_scoped(
            lambda *scoped: _body(
                dict(zip(names, refs, strict=True)),
                scoped,
                rule=rule,
                head_dim=head_dim,
                kv_heads=kv_heads,
                sizes=(block_tiles * BLOCKS, tiles, windows),
            ),
            plgpu.SMEM(
                (COMPUTE, WARPGROUP_ROWS, head_dim), query.dtype, transforms=tiled
            ),
            plgpu.SMEM((offsets, BLOCKS, head_dim), query.dtype, transforms=tiled),
            plgpu.SMEM((COMPUTE, WARPGROUP_ROWS, BLOCKS), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=offsets),
            collective_axes="wg",
        )

    rows = batch * kv_heads * tiles * TOKENS
    out = plgpu.kernel(
        block_scores_mosaic_gpu,
        out_type=jax.ShapeDtypeStruct((rows, block_tiles * BLOCKS), jnp.float32),
        grid=(tiles, block_tiles, batch * kv_heads),
        grid_names=("tile", "block", "pair"),
        num_threads=COMPUTE,
        thread_name="wg",
    )(q_start, num_windows, flat, keys)
    out = out.reshape(batch, kv_heads, tiles * TOKENS, block_tiles * BLOCKS)
    return out[:, :, :length, : rule.blocks]


@in_32_bit
def block_scores_mosaic_gpu(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "L B K W H"],
    q_start: Int[Array, " B"],
    num_windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    rule: Rule,
    lse: bool = True,
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"] | None]:
    """Computes scores; the arguments are those of the reference.

    Raises:
      NotImplementedError: for the softmax form, the log-sum-exp, sizes or dtypes that
        the kernel cannot tile, or without a Hopper device.
    """
    _check(query, rule)
    if lse:
        raise NotImplementedError(
            "mosaic_gpu computes no log-sum-exp; triton and xla do"
        )
    windows = compressed_keys.shape[3]
    keys = _keys_by_block(compressed_keys, layer, rule, cdiv(rule.blocks, BLOCKS))
    return _call(query, keys, q_start, num_windows, windows, rule), None


@in_32_bit
def select_blocks_mosaic_gpu(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "L B K W H"],
    q_start: Int[Array, " B"],
    num_windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    rule: Rule,
    budget: int,
    lse: bool = False,
    slab: int | None = None,
) -> tuple[Int[Array, "B K T P"], None]:
    """Scores and chooses slab by slab.

    Args:
      query: as in the reference, like the following ones.
      compressed_keys: means of windows.
      q_start: first positions.
      num_windows: complete windows of rows.
      layer: index into the leading axis.
      rule: sizes and form.
      budget: how many blocks each query lists.
      lse: refused when true.
      slab: tokens scored at a time.

    Returns:
      The lists, and None.

    Raises:
      NotImplementedError: as ``block_scores_mosaic_gpu``.
    """
    _check(query, rule)
    if lse:
        raise NotImplementedError(
            "mosaic_gpu computes no log-sum-exp; triton and xla do"
        )
    batch, length, kv_heads, head_dim = query.shape
    windows = compressed_keys.shape[3]
    keys = _keys_by_block(compressed_keys, layer, rule, cdiv(rule.blocks, BLOCKS))
    if slab is None:
        slab = SLAB_SCORES // (batch * kv_heads * rule.blocks)
    slab = TOKENS * max(1, slab // TOKENS)

    def one(query, start):
        scores = _call(query, keys, start, num_windows, windows, rule)
        position = start[:, None] + jnp.arange(query.shape[1])
        return choose_xla(scores, position, rule, budget)

    if length <= slab:
        return one(query, q_start), None
    slabs = cdiv(length, slab)
    query = jnp.pad(query, ((0, 0), (0, slabs * slab - length), (0, 0), (0, 0)))
    query = query.reshape(batch, slabs, slab, kv_heads, head_dim)
    lists = lax.map(
        lambda i: one(query[:, i], q_start + i * slab),
        jnp.arange(slabs, dtype=jnp.int32),
    )
    lists = jnp.moveaxis(lists, 0, 2)
    return lists.reshape(batch, kv_heads, -1, budget)[:, :, :length], None
