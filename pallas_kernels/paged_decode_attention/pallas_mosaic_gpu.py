"""Paged decode attention on Mosaic GPU (Hopper: TMA, wgmma and clusters).

Algorithm: the slots of a (row, kv head) are split over thread blocks. In each, the last
warpgroup reads slot numbers and issues one TMA copy for the keys and one for the values
of a slot into a ring of shared-memory stages; one or two others take the slots in turn
and run the online softmax with all G query heads as rows of the matrix instruction (64
rows, the rest padding: the kernel waits for memory, not for tensor cores). Each leaves
its normalised part and its log-sum-exps in shared memory, where the ring was; after a
barrier each reads some rows of all of them and writes the merged result. With
``Config.cluster`` that spans the thread blocks of a cluster, in a fixed order and
without atomic operations; what several clusters give, XLA merges. Grid: (clusters, K,
B).

Only a partial slot is masked. Its values beyond the length are zeroed in shared
memory, for they meet weights of 0 and might be NaN.

Shared memory: 64 x H queries and per stage 2 x block x H: for H = 128, blocks of 64
and 6 stages 208 KiB.

Measured on one H200 (jax 0.11.2, bfloat16, 32/2 heads, H = 128, 96 slots of 64), by
the durations of all kernels in a profile, beside a large device copy in the same run
(4,308 GB/s, reads and writes counted):

* batch 64, no splits: 102.7 us ±0.2 % with two compute warpgroups, 3,919 GB/s, 91 %;
  104.6 us with one. Two splits merged in a cluster: 107.1 us.
* batch 8, one cluster of 8 a (row, kv head): 32.2 to 33.1 us, 36 %, whatever the
  stages, more than twice what the bytes need; 8 splits merged by XLA took 21.3 us
  (commit 455a84d; Triton with its merge kernel 19.6 in the same run). Clusters of 4 at
  batch 16 did no better (48 to 61 us in a variant without memory warpgroup). The likely
  cause, not shown: large thread blocks of a cluster must share a group of
  multiprocessors, so that not all clusters run at once. Hence the default is none.

Limits: bfloat16 or float16; H a multiple of 64 up to 256; blocks of 64 or 128 tokens
that fit in shared memory; G at most 64; positive scale.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._common.mosaic import (
    SHARED_BYTES,
    WARPGROUP_ROWS,
    bias_row,
    cluster_fence,
    fill_and_refill,
    load_from_member,
    operand_transforms,
    require_attention_sizes,
    softmax_start,
    store_rows,
)
from pallas_kernels._common.numerics import LN_2, LOG2_E, NEG_INF, cdiv, in_32_bit
from pallas_kernels._common.splits import merge_splits
from pallas_kernels.paged_decode_attention.mosaic_config import Config, config_for
from pallas_kernels.paged_decode_attention.operands import Decode

# A row of log-sum-exps: 64 of queries, padded to what a warpgroup loads.
LSE_ROWS = 128


def _rows_of_a_worker(out_rows: int, head_dim: int, workers: int) -> int:
    """Rows that each of the first ``out_rows // rows`` workers merges.

    A warpgroup holds a multiple of 128 elements.
    """
    while out_rows % workers or (out_rows // workers) * head_dim % 128:
        workers -= 1
    return out_rows // workers


class _Sizes(NamedTuple):
    """What a trace fixes."""

    config: Config
    batch: int
    kv_heads: int
    head_dim: int
    block: int
    listed: int
    capacity: int
    out_rows: int
    scale: float

    @property
    def per_split(self) -> int:
        """Slots of a thread block."""
        return cdiv(self.listed, self.config.splits)

    @property
    def clusters(self) -> int:
        """Clusters that share the slots of a (row, kv head)."""
        return self.config.splits // self.config.cluster

    @property
    def workers(self) -> int:
        """Partial results of a cluster."""
        return self.config.cluster * self.config.warpgroups


def _body(refs, scoped, sizes: _Sizes):
    """One thread block: a memory warpgroup and one or two that compute."""
    q_smem, k_union, v_union, lse_smem, bias_smem = scoped[:5]
    q_ready, k_ready, v_ready, k_done, v_done, arrived, read = scoped[5:]
    k_smem, out_smem = k_union
    v_smem, level_smem = v_union
    config, block, head_dim = sizes.config, sizes.block, sizes.head_dim
    dtype = q_smem.dtype
    sparse = "slots" in refs
    part, k, b = (lax.axis_index(name) for name in ("part", "k", "b"))
    member, wg = lax.axis_index("member"), lax.axis_index("wg")
    pair = b * sizes.kv_heads + k
    base = refs["layer"][0] * (sizes.batch * sizes.kv_heads) + pair
    base = base * sizes.capacity
    first = (part * config.cluster + member) * sizes.per_split
    last = jnp.minimum(first + sizes.per_split, sizes.listed)
    if not sparse:
        used = jnp.maximum(refs["lengths"][b], 0) + (block - 1)
        last = jnp.minimum(last, lax.div(used, jnp.int32(block)))
    steps = jnp.maximum(last - first, 0)

    def slot_at(step):
        if not sparse:
            return first + step
        return jnp.clip(refs["slots"][pair, first + step], 0, sizes.capacity - 1)

    def length_at(step):
        # The loads of the steps after the last one stay inside the list.
        if not sparse:
            return refs["lengths"][b] - (first + step) * block
        j = jnp.minimum(first + step, sizes.listed - 1)
        return jnp.where(refs["slots"][pair, j] < 0, 0, refs["lengths"][pair, j])

    @pl.when(wg == config.warpgroups)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(step, stage):
            rows = pl.ds((base + slot_at(step)) * block, block)
            plgpu.copy_gmem_to_smem(
                refs["kv"].at[rows, pl.ds(0, head_dim)],
                k_smem.at[stage],
                k_ready.at[stage],
            )
            if bias_smem is not None:
                plgpu.copy_gmem_to_smem(
                    refs["bias"].at[rows], bias_smem.at[stage], k_ready.at[stage]
                )
            plgpu.copy_gmem_to_smem(
                refs["kv"].at[rows, pl.ds(head_dim, head_dim)],
                v_smem.at[stage],
                v_ready.at[stage],
            )

        fill_and_refill(fetch, steps, config.stages, (k_done, v_done))

    @pl.when(wg < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        # Rows after those of this pair belong to the next one, or are zeros after
        # the last: nobody reads what becomes of them.
        rows = pl.ds(pl.multiple_of(pair * sizes.out_rows, 8), WARPGROUP_ROWS)

        @pl.when(wg == 0)
        def _fetch_queries():
            plgpu.copy_gmem_to_smem(refs["q"].at[rows], q_smem, q_ready)

        plgpu.barrier_wait(q_ready)
        shape = (WARPGROUP_ROWS, block)

        def column(shape, dimension):
            return plgpu.broadcasted_iota(
                jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA
            )

        def step_body(i, carry):
            acc, top, total, length = carry
            step = i * config.warpgroups + wg
            stage = lax.rem(step, jnp.int32(config.stages))
            following = length_at(step + config.warpgroups)
            plgpu.barrier_wait(k_ready.at[stage])

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, q_smem, k_smem.at[stage].transpose((1, 0)))
                return acc_ref[...]

            logits = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            logits = logits * (sizes.scale * LOG2_E)
            if bias_smem is not None:
                logits = logits + bias_row(bias_smem.at[stage], shape)
            plgpu.barrier_arrive(k_done.at[stage])
            logits = lax.cond(
                length >= block,
                lambda x, _: x,
                lambda x, n: jnp.where(column(shape, 1) < n, x, NEG_INF),
                logits,
                length,
            )
            new_top = jnp.maximum(top, logits.max(axis=1))
            fade = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, shape, [0]))
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
            total = total * fade + weights.sum(axis=1)
            plgpu.barrier_wait(v_ready.at[stage])

            @pl.when(length < block)
            def _clear_beyond_the_length():
                part = v_smem.at[stage]
                tile = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                kept = column((block, head_dim), 0) < length
                part[...] = jnp.where(kept, tile, jnp.zeros_like(tile))
                plgpu.commit_smem()

            def values(acc_ref):
                plgpu.wgmma(acc_ref, weights.astype(dtype), v_smem.at[stage])

            acc = pl.run_state(values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_done.at[stage])
            return acc, new_top, total, following

        mine = lax.div(
            steps + (config.warpgroups - 1) - wg, jnp.int32(config.warpgroups)
        )
        carry = (*softmax_start(head_dim), length_at(wg))
        acc, top, total, _ = lax.fori_loop(0, mine, step_body, carry)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        level = jnp.where(empty, NEG_INF, top + jnp.log2(total))
        result = (pair * sizes.clusters + part) * sizes.out_rows
        # From here on results lie where the ring was. Every copy into it has landed;
        # the barrier is for products that other warps may still read for.
        plgpu.barrier_arrive(read)
        plgpu.barrier_wait(read)
        wide, narrow = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        levels = plgpu.layout_cast(lax.broadcast_in_dim(level, acc.shape, [0]), wide)
        store_rows(acc, out_smem.at[wg], wide)
        store_rows(levels, level_smem.at[wg], wide)
        store_rows(level, lse_smem.at[wg, pl.ds(0, WARPGROUP_ROWS)], narrow)
        plgpu.commit_smem()
        _merge(refs, (out_smem, level_smem, lse_smem), arrived, result, sizes)


def _merge(refs, smem, arrived, result, sizes: _Sizes):
    """Merges the parts of a cluster, each worker some rows, and writes them."""
    out_smem, level_smem, lse_smem = smem
    config, head_dim = sizes.config, sizes.head_dim
    member, wg = lax.axis_index("member"), lax.axis_index("wg")
    worker = member * config.warpgroups + wg
    rows = _rows_of_a_worker(sizes.out_rows, head_dim, sizes.workers)
    sources = [(m, w) for m in range(config.cluster) for w in range(config.warpgroups)]

    def everyone():
        """Waits for the cluster's warpgroups; what they wrote before is seen after."""
        cluster_fence()
        plgpu.barrier_arrive(arrived)
        plgpu.barrier_wait(arrived)
        cluster_fence()

    def merged(levels, values):
        top = functools.reduce(jnp.maximum, levels)
        empty = top == NEG_INF
        top = jnp.where(empty, 0.0, top)
        weights = [jnp.exp2(x - top) for x in levels]
        total = jnp.where(empty, 1.0, functools.reduce(operator.add, weights))
        level = jnp.where(empty, NEG_INF, top + jnp.log2(total)) * LN_2
        if values is None:
            return level
        out = [w * x for w, x in zip(weights, values, strict=True)]
        return functools.reduce(operator.add, out) / total

    if sizes.workers > 1:
        everyone()

    @pl.when(worker * rows < sizes.out_rows)
    def _rows():
        part = pl.ds(worker * rows, rows)

        def load(ref, m, w):
            return load_from_member(ref.at[w, part], (rows, head_dim), m)

        out = merged(
            [load(level_smem, m, w) for m, w in sources],
            [load(out_smem, m, w) for m, w in sources],
        )
        place = refs["out"].at[pl.ds(result + worker * rows, rows)]
        place[...] = out.astype(refs["out"].dtype)

    @pl.when(worker == sizes.workers - 1)
    def _lse():
        levels = [load_from_member(lse_smem.at[w], (LSE_ROWS,), m) for m, w in sources]
        place = lax.div(result, jnp.int32(sizes.out_rows)) * LSE_ROWS
        refs["lse"][pl.ds(place, LSE_ROWS)] = merged(levels, None)

    if config.cluster > 1:
        # Nobody leaves while another may still read its shared memory.
        plgpu.commit_smem()
        everyone()


@in_32_bit
def paged_decode_attention_mosaic_gpu(
    operands: Decode, *, config: Config | None = None
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """As the Triton form; ``config`` has the recorded or heuristic settings by default.

    Raises:
      NotImplementedError: for sizes that are not the kernel's, or without Hopper.
      ValueError: for a ``config`` that needs more shared memory than there is.
    """
    if operands.stored is not None:
        raise NotImplementedError("mosaic_gpu does not read slots in 8 bits")
    q, key_bias, groups = operands.q, operands.key_bias, operands.groups
    batch, heads, head_dim = q.shape
    kv_heads, capacity, block = operands.kv.shape[2:5]
    require_attention_sizes(operands, groups)
    if block % 64:
        # Clearing the values beyond a length loads them in the layout of wgmma.
        raise NotImplementedError(
            f"mosaic_gpu decodes blocks of 64 or 128 tokens, not {block}"
        )
    listed = operands.listed
    if Config(1).shared_bytes(head_dim, block) > SHARED_BYTES - 4096:
        raise NotImplementedError(
            f"mosaic_gpu has no room for blocks of {block} tokens with head dim "
            f"{head_dim} in 227 KiB of shared memory"
        )
    config = config or config_for(batch, kv_heads, listed, head_dim, block)
    if config.shared_bytes(head_dim, block) > SHARED_BYTES - 4096:
        raise ValueError(
            f"{config} does not fit blocks of {block} tokens and head dim {head_dim} "
            "in 227 KiB of shared memory"
        )
    out_rows = 8 * cdiv(groups, 8)
    query = q.reshape(batch, kv_heads, groups, head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, out_rows - groups), (0, 0)))
    query = query.reshape(-1, head_dim)
    if query.shape[0] < WARPGROUP_ROWS:
        query = jnp.pad(query, ((0, WARPGROUP_ROWS - query.shape[0]), (0, 0)))
    inputs = {
        "layer": operands.layer.reshape(1),
        "q": query,
        "kv": operands.kv.reshape(-1, 2 * head_dim),
    }
    if operands.slots is None:
        assert operands.lengths is not None
        inputs["lengths"] = operands.lengths
    else:
        assert operands.slot_lengths is not None
        inputs["slots"] = operands.slots.reshape(-1, listed)
        inputs["lengths"] = operands.slot_lengths.reshape(-1, listed)
    if key_bias is not None:
        inputs["bias"] = key_bias.reshape(-1)
    names = (*inputs, "out", "lse")
    sizes = _Sizes(
        config,
        batch,
        kv_heads,
        head_dim,
        block,
        listed,
        capacity,
        out_rows,
        operands.scale,
    )

    def paged_decode_attention_mosaic_gpu(*refs):
        tiled = operand_transforms()
        ring = (config.stages, block, head_dim)
        results = (config.warpgroups, WARPGROUP_ROWS, head_dim)
        bias = None
        if key_bias is not None:
            bias = plgpu.SMEM((config.stages, block), jnp.float32)
        per_stage = {"num_barriers": config.stages}
        arrived = plgpu.Barrier(num_arrivals=config.warpgroups)
        if config.cluster > 1:
            arrived = plgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=config.warpgroups
            )

        def union():
            return plgpu.RefUnion(
                plgpu.SMEM(ring, q.dtype, transforms=tiled),
                plgpu.SMEM(results, jnp.float32),
            )

        pl.run_scoped(
            lambda *scoped: _body(dict(zip(names, refs, strict=True)), scoped, sizes),
            plgpu.SMEM((WARPGROUP_ROWS, head_dim), q.dtype, transforms=tiled),
            union(),
            union(),
            plgpu.SMEM((config.warpgroups, LSE_ROWS), jnp.float32),
            bias,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=1 if bias is None else 2, **per_stage),
            plgpu.Barrier(**per_stage),
            plgpu.Barrier(**per_stage),
            plgpu.Barrier(**per_stage),
            arrived,
            plgpu.Barrier(num_arrivals=config.warpgroups),
            collective_axes="wg",
        )

    clusters = sizes.clusters
    parts = batch * kv_heads * clusters
    out, lse = plgpu.kernel(
        paged_decode_attention_mosaic_gpu,
        out_type=(
            jax.ShapeDtypeStruct(
                (parts * out_rows, head_dim), q.dtype if clusters == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((parts * LSE_ROWS,), jnp.float32),
        ),
        grid=(clusters, kv_heads, batch),
        grid_names=("part", "k", "b"),
        cluster=(config.cluster,),
        cluster_names=("member",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    out = out.reshape(batch, kv_heads, clusters, out_rows, head_dim)[..., :groups, :]
    lse = lse.reshape(batch, kv_heads, clusters, LSE_ROWS)[..., :groups]
    if clusters > 1:
        out, lse = merge_splits(out, lse)
    out = out.reshape(batch, heads, head_dim).astype(q.dtype)
    return out, lse.reshape(batch, heads)
