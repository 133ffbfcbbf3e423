"""Paged decode attention on Mosaic GPU (Hopper: TMA and wgmma).

Algorithm: the slots of a (row, kv head) are split over thread blocks. In each, warp-
group 1 reads slot numbers and issues one TMA copy for the keys and one for the values
of a slot into a ring of shared-memory stages; warpgroup 0 runs the online softmax with
all G query heads as rows of the matrix instruction (64 rows, the rest padding: the
kernel waits for memory, not for tensor cores). XLA merges the normalised parts through
their log-sum-exps. Grid: (splits, K, B).

Only a partial slot is masked. Its values beyond the length are zeroed in shared
memory, for they meet weights of 0 and might be NaN.

Shared memory: 64 x H queries, 64 x H float32 output, and per stage 2 x block x H: for
H = 128, blocks of 64 and 4 stages 176 KiB.

Measured on one H200 (jax 0.11.2, bfloat16, 32/2 heads, H = 128, 96 slots of 64), time
of this kernel alone from a profile, with the rate as a share of a device copy measured
in the same run (3,626 GB/s, reads and writes counted):

* batch 1: 5.3 us; batch 8: 19.2 us, 72 %; batch 16: 36.3 us, 77 %;
  batch 64: 105.0 us, 106 % (a copy also writes).

The merge in XLA adds 3.5 to 5 us in two or three launches: with it 58 % at
batch 8, 70 % at 16, 102 % at 64. Triton is a little faster throughout.

Limits: bfloat16 or float16; H a multiple of 64 up to 256; blocks of 64 or 128 tokens
that fit in shared memory; G at most 64; positive scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels._common.dispatch import in_32_bit, tuned_config
from pallas_kernels._common.mosaic import (
    LOWEST,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    operand_transforms,
    require_mosaic_sizes,
)
from pallas_kernels._common.numerics import LN_2, LOG2_E, NEG_INF, cdiv
from pallas_kernels._common.splits import merge_splits

COMPUTE, MEMORY = 0, 1  # warpgroups


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      splits: thread blocks that share the slots of one (row, kv head).
      stages: stages of the shared-memory ring, at least 2.
    """

    splits: int
    stages: int = 2

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"splits is {self.splits}; it must be at least 1")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; it must be at least 2")

    def shared_bytes(self, head_dim: int, block: int) -> int:
        """Shared memory for queries, output and the ring, in bytes."""
        return head_dim * (WARPGROUP_ROWS * 6 + 4 * self.stages * block)


def default_config(
    batch: int, kv_heads: int, listed: int, head_dim: int, block: int
) -> Config:
    """Two thread blocks on each of 132 multiprocessors, with the stages that fit."""
    splits = max(1, min(cdiv(264, batch * kv_heads), cdiv(listed, 2)))
    half = SHARED_BYTES // 2 - 4096
    stages = (half // head_dim - WARPGROUP_ROWS * 6) // (4 * block)
    return Config(splits=splits, stages=max(2, min(8, stages)))


def config_for(
    batch: int, kv_heads: int, listed: int, head_dim: int, block: int
) -> Config:
    """The recorded settings of this device kind, or the heuristic."""
    sizes = {"B": batch, "K": kv_heads, "P": listed, "H": head_dim, "block": block}
    found = tuned_config("paged_decode_attention", "mosaic_gpu", sizes)
    if found:
        return Config(**found)
    return default_config(batch, kv_heads, listed, head_dim, block)


def _body(refs, scoped, *, config, head_dim, block, dtype, kv_heads, sizes, scale):
    q_smem, k_smem, v_smem, out_smem, lse_smem, bias_smem = scoped[:6]
    q_ready, k_ready, v_ready, k_done, v_done = scoped[6:]
    per_split, listed, capacity, splits, batch, out_rows = sizes
    sparse = "slots" in refs
    split, k, b = (lax.axis_index(name) for name in ("split", "k", "b"))
    wg = lax.axis_index("wg")
    pair = b * kv_heads + k
    base = (refs["layer"][0] * (batch * kv_heads) + pair) * capacity
    first = split * per_split
    last = jnp.minimum(first + per_split, listed)
    if not sparse:
        used = jnp.maximum(refs["lengths"][b], 0) + (block - 1)
        last = jnp.minimum(last, lax.div(used, jnp.int32(block)))
    steps = jnp.maximum(last - first, 0)

    def slot_at(step):
        if not sparse:
            return first + step
        return jnp.clip(refs["slots"][pair, first + step], 0, capacity - 1)

    def length_at(step):
        # The loads of the step after the last one stay inside the list.
        if not sparse:
            return refs["lengths"][b] - (first + step) * block
        j = jnp.minimum(first + step, listed - 1)
        return jnp.where(refs["slots"][pair, j] < 0, 0, refs["lengths"][pair, j])

    @pl.when(wg == MEMORY)
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

        for stage in range(config.stages):

            @pl.when(stage < steps)
            def _fill(stage=stage):
                fetch(jnp.int32(stage), stage)

        def refill(step, carry):
            stage = lax.rem(step, jnp.int32(config.stages))
            plgpu.barrier_wait(k_done.at[stage])
            plgpu.barrier_wait(v_done.at[stage])
            fetch(step, stage)
            return carry

        lax.fori_loop(config.stages, jnp.maximum(steps, config.stages), refill, 0)

    @pl.when(wg == COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        # Rows after those of this pair belong to the next one, or are zeros after
        # the last: nobody reads what becomes of them.
        rows = pl.ds(pl.multiple_of(pair * out_rows, 8), WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(refs["q"].at[rows], q_smem, q_ready)
        plgpu.barrier_wait(q_ready)
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        shape = (WARPGROUP_ROWS, block)

        def column(shape, dimension):
            return plgpu.broadcasted_iota(
                jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA
            )

        def step_body(step, carry):
            acc, top, total, length = carry
            stage = lax.rem(step, jnp.int32(config.stages))
            following = length_at(step + 1)
            plgpu.barrier_wait(k_ready.at[stage])

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, q_smem, k_smem.at[stage].transpose((1, 0)))
                return acc_ref[...]

            logits = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            logits = logits * (scale * LOG2_E)
            if bias_smem is not None:
                bias = plgpu.load(
                    bias_smem.at[stage], layout=plgpu.Layout.WGMMA.reduce(0)
                )
                logits = logits + lax.broadcast_in_dim(bias * LOG2_E, shape, [1])
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

        def filled(value, layout, *shape):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        carry = (
            filled(0.0, plgpu.Layout.WGMMA, WARPGROUP_ROWS, head_dim),
            filled(LOWEST, row_layout, WARPGROUP_ROWS),
            filled(0.0, row_layout, WARPGROUP_ROWS),
            length_at(jnp.int32(0)),
        )
        acc, top, total, _ = lax.fori_loop(0, steps, step_body, carry)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        out_smem[...] = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        lse_smem[...] = jnp.where(empty, NEG_INF, top * LN_2 + jnp.log(total))
        plgpu.commit_smem()
        part = pair * splits + split
        plgpu.copy_smem_to_gmem(
            out_smem.at[pl.ds(0, out_rows)],
            refs["out"].at[pl.ds(part * out_rows, out_rows)],
        )
        plgpu.copy_smem_to_gmem(
            lse_smem, refs["lse"].at[pl.ds(part * WARPGROUP_ROWS, WARPGROUP_ROWS)]
        )
        plgpu.wait_smem_to_gmem(0)


@in_32_bit
def paged_decode_attention_mosaic_gpu(
    q: Float[Array, "B N H"],
    kv: Float[Array, "L B K C block 2 H"],
    slots: Int[Array, "B K P"] | None,
    slot_lengths: Int[Array, "B K P"] | None,
    lengths: Int[Array, " B"] | None,
    layer: Int[Array, ""],
    key_bias: Float[Array, "L B K C block"] | None,
    *,
    scale: float,
    config: Config | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp.

    Args:
      q: as in the reference, like the following ones.
      kv: slots.
      slots: list or None.
      slot_lengths: valid tokens of listed slots.
      lengths: valid tokens of rows.
      layer: index into the leading axis.
      key_bias: bias or None.
      scale: factor of the logits.
      config: settings; recorded or heuristic ones by default.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: for sizes or dtypes that the kernel cannot tile, or without
        a Hopper device.
      ValueError: for a ``config`` that does not fit in shared memory.
    """
    batch, heads, head_dim = q.shape
    _, _, kv_heads, capacity, block, _, _ = kv.shape
    require_mosaic_sizes(q.dtype, head_dim, block)
    groups = heads // kv_heads
    if groups > WARPGROUP_ROWS:
        raise NotImplementedError(
            f"mosaic_gpu needs at most {WARPGROUP_ROWS} query heads a kv head, not "
            f"{groups}"
        )
    if block % 64:
        # Clearing the values beyond a length loads them in the layout of wgmma.
        raise NotImplementedError(
            f"mosaic_gpu decodes blocks of 64 or 128 tokens, not {block}"
        )
    if scale <= 0:
        raise NotImplementedError(f"mosaic_gpu needs a positive scale, not {scale}")
    listed = capacity if slots is None else slots.shape[-1]
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
    splits = min(config.splits, listed)
    out_rows = 8 * cdiv(groups, 8)
    query = q.reshape(batch, kv_heads, groups, head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, out_rows - groups), (0, 0)))
    query = query.reshape(-1, head_dim)
    if query.shape[0] < WARPGROUP_ROWS:
        query = jnp.pad(query, ((0, WARPGROUP_ROWS - query.shape[0]), (0, 0)))
    operands = {
        "layer": layer.reshape(1),
        "q": query,
        "kv": kv.reshape(-1, 2 * head_dim),
    }
    if slots is None:
        assert lengths is not None
        operands["lengths"] = lengths
    else:
        assert slot_lengths is not None
        operands["slots"] = slots.reshape(-1, listed)
        operands["lengths"] = slot_lengths.reshape(-1, listed)
    if key_bias is not None:
        operands["bias"] = key_bias.reshape(-1)
    names = (*operands, "out", "lse")

    def paged_decode_attention_mosaic_gpu(*refs):
        tiled = operand_transforms()
        ring = (config.stages, block, head_dim)
        bias = None
        if key_bias is not None:
            bias = plgpu.SMEM((config.stages, block), jnp.float32)
        copies = 1 if key_bias is None else 2
        pl.run_scoped(
            lambda *scoped: _body(
                dict(zip(names, refs, strict=True)),
                scoped,
                config=config,
                head_dim=head_dim,
                block=block,
                dtype=q.dtype,
                kv_heads=kv_heads,
                sizes=(
                    cdiv(listed, splits),
                    listed,
                    capacity,
                    splits,
                    batch,
                    out_rows,
                ),
                scale=scale,
            ),
            plgpu.SMEM((WARPGROUP_ROWS, head_dim), q.dtype, transforms=tiled),
            plgpu.SMEM(ring, q.dtype, transforms=tiled),
            plgpu.SMEM(ring, q.dtype, transforms=tiled),
            plgpu.SMEM((WARPGROUP_ROWS, head_dim), jnp.float32),
            plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32),
            bias,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
            plgpu.Barrier(num_barriers=config.stages),
            plgpu.Barrier(num_barriers=config.stages),
            plgpu.Barrier(num_barriers=config.stages),
            collective_axes="wg",
        )

    parts = batch * kv_heads * splits
    out, lse = plgpu.kernel(
        paged_decode_attention_mosaic_gpu,
        out_type=(
            jax.ShapeDtypeStruct((parts * out_rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts * WARPGROUP_ROWS,), jnp.float32),
        ),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "k", "b"),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())
    out = out.reshape(batch, kv_heads, splits, out_rows, head_dim)[..., :groups, :]
    lse = lse.reshape(batch, kv_heads, splits, WARPGROUP_ROWS)[..., :groups]
    if splits > 1:
        out, lse = merge_splits(out, lse)
    out = out.reshape(batch, heads, head_dim).astype(q.dtype)
    return out, lse.reshape(batch, heads)
