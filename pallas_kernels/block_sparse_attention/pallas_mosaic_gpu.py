"""Block-sparse causal attention on Mosaic GPU (Hopper: wgmma and TMA).

Algorithm: a thread block owns 128 query rows: 128 / G consecutive tokens with all G
query heads of one kv head, so that the matrix instruction is full although each token
has its own list. It walks over the union of the tokens' lists (``unions.py``), or over
all blocks up to its last position without lists, ``keys`` keys a step.

Pipeline: warpgroup 2 reads block numbers and issues one TMA copy a block into a ring
of ``stages`` shared-memory stages; warpgroups 0 and 1 each own 64 rows and alternate,
one in the softmax while the other has the tensor cores. Each step is masked only when
one of its blocks is not listed by all tokens of the warpgroup or reaches past the
first of them; the words of the next step are loaded a step ahead. Grid: (tiles, K, B),
neighbouring tiles sharing blocks in L2.

Shared memory: 128 x H queries, reused for the output, and per stage ``keys`` x H keys
and as many values: 160 KiB for H = 128, 128 keys, 2 stages.

Measured on one H200 (jax 0.11.2, bfloat16, T = 131,072, 32/2 heads, H = 128, P = 96;
medians of 5, the unions included), in TFLOP/s on the selected work:

* tokens that agree in groups of 64: 25.3 ms ±3.2 %, 510 (Triton: 44.3 ms, 291); in
  groups of 8: 26.2 ms, 493. cuDNN's dense causal attention took 246.8 ms in the same
  run: 9.8 times as long. The unions are 2.6 ms of it.
* tokens that agree in nothing but the forced blocks: 107 ms, 120. A tile then reads
  385 blocks for 96; the mask throws the rest away. That is what bounds it.
* dense causal, without lists: 256.3 ms, 549 (cuDNN: 570).
* in a later run, timed in a profile: 24.7 ms ±2.8 %, 521 TFLOP/s, where torch 2.11's
  FlexAttention with the same block mask took 43.8 ms, 294, and cuDNN dense 243.2 ms.
* alternating the warpgroups gains 5 %; steps of 64 keys with more stages lose 4-11 %
  (both at T = 16,384).

Limits: bfloat16 or float16; H a multiple of 64 up to 256; blocks of 16 to 128 tokens;
G at most 64; positive scale. Runs behind a check that all values are finite and
otherwise hands over to the XLA form.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    fill_and_refill,
    operand_transforms,
    require_attention_sizes,
    softmax_start,
)
from pallas_kernels._common.numerics import LN_2, LOG2_E, NEG_INF, cdiv, in_32_bit
from pallas_kernels._common.triton import next_power_of_two
from pallas_kernels.block_sparse_attention.operands import Prefill
from pallas_kernels.block_sparse_attention.rows import fold_queries, unfold_queries
from pallas_kernels.block_sparse_attention.unions import unions_of, where_finite
from pallas_kernels.dispatch import tuned_config

COMPUTE = 2  # compute warpgroups
ROWS = COMPUTE * WARPGROUP_ROWS


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      keys: keys of a step, 64 or 128 and at least a block.
      stages: stages of the shared-memory ring, at least 2.
      alternate: order the two compute warpgroups by a barrier.
      in_place: read queries and write outputs in the order of the call, a copy a token,
        where tokens fill whole tiles; else they are put in the kernel's order before
        and after it.
    """

    keys: int = 128
    stages: int = 2
    alternate: bool = True
    in_place: bool = False

    def __post_init__(self):
        if self.keys not in (64, 128):
            raise ValueError(f"keys is {self.keys}; allowed: 64, 128")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; it must be at least 2")

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory for queries and the ring, in bytes."""
        return 2 * head_dim * (ROWS + 2 * self.stages * self.keys)


def config_for(groups: int, head_dim: int, block: int, listed: int | None) -> Config:
    """The recorded settings of this device kind, or the largest that fit."""
    sizes = {"G": groups, "H": head_dim, "block": block, "P": listed}
    found = tuned_config("block_sparse_attention", "mosaic_gpu", sizes)
    if found:
        return Config(**found)
    if head_dim <= 64:
        return Config(keys=128, stages=4)
    if head_dim <= 128:
        return Config(keys=128, stages=2)
    return Config(keys=max(64, block), stages=2)


def _entry(*refs, names, **static):
    """Allocates shared memory and barriers, then runs the body."""
    config, head_dim = static["config"], static["head_dim"]
    block, dtype = static["block"], static["dtype"]
    refs = dict(zip(names, refs, strict=True))
    tiled = operand_transforms()
    per_step = config.keys // block
    ring = (config.stages, config.keys, head_dim)
    copies = per_step * (2 if "bias" in refs else 1)
    query_copies = static["tokens"] // COMPUTE if static["in_place"] else 1
    bias = None
    if "bias" in refs:
        bias = plgpu.SMEM((config.stages, config.keys), jnp.float32)
    pl.run_scoped(
        lambda *scoped: _body(refs, scoped, **static),
        plgpu.SMEM((COMPUTE, WARPGROUP_ROWS, head_dim), dtype, transforms=tiled),
        plgpu.SMEM(ring, dtype, transforms=tiled),
        plgpu.SMEM(ring, dtype, transforms=tiled),
        plgpu.SMEM((COMPUTE, WARPGROUP_ROWS), jnp.float32),
        bias,
        plgpu.Barrier(num_arrivals=query_copies, num_barriers=COMPUTE),
        plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=per_step, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=COMPUTE),
        collective_axes="wg",
    )


def _body(
    refs,
    scoped,
    *,
    config,
    head_dim,
    block,
    dtype,
    tokens,
    kv_heads,
    tiles,
    all_blocks,
    in_place,
):
    (
        q_smem,
        k_smem,
        v_smem,
        lse_smem,
        bias_smem,
        q_ready,
        k_ready,
        v_ready,
        k_done,
        v_done,
        turn,
    ) = scoped
    sparse = "blocks" in refs
    tile, k, b = (lax.axis_index(name) for name in ("tile", "k", "b"))
    wg = lax.axis_index("wg")
    per_step = config.keys // block
    pair = b * kv_heads + k
    flat = pair * tiles + tile
    first = refs["start"][b] + tile * tokens
    base = refs["layer"][0] * static_pairs(refs, all_blocks, block) + pair
    if sparse:
        steps = lax.div(refs["count"][flat] + (per_step - 1), jnp.int32(per_step))
    else:
        used = jnp.clip(first + tokens, 0, all_blocks * block)
        steps = lax.div(used + (config.keys - 1), jnp.int32(config.keys))

    def block_at(j):
        if sparse:
            return refs["blocks"][flat, j]
        return jnp.minimum(j, all_blocks - 1)

    @pl.when(wg == COMPUTE)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(step, stage):
            for i in range(per_step):
                number = base * all_blocks + block_at(step * per_step + i)
                rows = pl.ds(number * block, block)
                part = pl.ds(i * block, block)
                plgpu.copy_gmem_to_smem(
                    refs["kv"].at[rows, pl.ds(0, head_dim)],
                    k_smem.at[stage, part],
                    k_ready.at[stage],
                )
                if bias_smem is not None:
                    plgpu.copy_gmem_to_smem(
                        refs["bias"].at[rows],
                        bias_smem.at[stage, part],
                        k_ready.at[stage],
                    )
            for i in range(per_step):
                number = base * all_blocks + block_at(step * per_step + i)
                rows = pl.ds(number * block, block)
                part = pl.ds(i * block, block)
                plgpu.copy_gmem_to_smem(
                    refs["kv"].at[rows, pl.ds(head_dim, head_dim)],
                    v_smem.at[stage, part],
                    v_ready.at[stage],
                )

        fill_and_refill(fetch, steps, config.stages, (k_done, v_done))

    @pl.when(wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        q_part, lse_part = q_smem.at[wg], lse_smem.at[wg]
        rows = pl.ds(flat * ROWS + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        mine = tokens // COMPUTE  # tokens of this warpgroup
        group_rows = WARPGROUP_ROWS // mine

        def pieces(ref):
            """Parts of a [rows, H] operand, and the rows of the tile that they are."""
            if not in_place:
                return [(ref.at[rows], pl.ds(0, WARPGROUP_ROWS))]
            token = (b * tiles + tile) * tokens + wg * mine
            row = (token * kv_heads + k) * group_rows
            stride = kv_heads * group_rows
            return [
                (
                    ref.at[pl.ds(row + i * stride, group_rows)],
                    pl.ds(i * group_rows, group_rows),
                )
                for i in range(mine)
            ]

        for part, inside in pieces(refs["q"]):
            plgpu.copy_gmem_to_smem(part, q_part.at[inside], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        my_first = first + wg * mine
        everyone = jnp.int32((1 << mine) - 1)
        shape = (WARPGROUP_ROWS, config.keys)

        def take_turn():
            if config.alternate:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def words_at(step):
            """For each block of a step: who lists it (bits), and where it starts."""
            found = []
            for i in range(per_step):
                j = step * per_step + i
                if sparse:
                    j = jnp.minimum(j, refs["words"].shape[1] - 1)
                    word = lax.shift_right_logical(
                        refs["words"][flat, j], (wg * mine).astype(jnp.int32)
                    )
                    found.append((word & everyone, refs["blocks"][flat, j] * block))
                else:
                    found.append((everyone, j * block))
            return tuple(found)

        def mask(logits, words):
            token = lax.div(
                plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA),
                jnp.int32(group_rows),
            )
            column = plgpu.broadcasted_iota(
                jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
            )
            limit = None
            for i, (word, start) in reversed(list(enumerate(words))):
                # Columns below the limit may be read; the limit of a block that the
                # token does not list is its first column.
                readable = jnp.clip(my_first + token - start + 1, 0, block)
                listed = lax.shift_right_logical(word, token) & 1
                mine_limit = readable * listed + i * block
                if limit is None:
                    limit = mine_limit
                else:
                    limit = jnp.where(column < (i + 1) * block, mine_limit, limit)
            assert limit is not None
            return jnp.where(column < limit, logits, NEG_INF)

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_wait(k_ready.at[0])

        pl.when(wg == 1)(take_turn)

        def step_body(step, carry):
            acc, top, total, words = carry
            stage = lax.rem(step, jnp.int32(config.stages))

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, q_part, k_smem.at[stage].transpose((1, 0)))
                take_turn()
                return acc_ref[...]

            logits = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            logits = logits * refs["scale"]
            if bias_smem is not None:
                logits = logits + bias_row(bias_smem.at[stage], shape)
            plgpu.barrier_arrive(k_done.at[stage])
            following = words_at(step + 1)
            unmasked = jnp.bool_(True)
            for word, start in words:
                unmasked &= (word == everyone) & (start + (block - 1) <= my_first)
            logits = lax.cond(
                unmasked, lambda x, _: x, lambda x, w: mask(x, w), logits, words
            )
            new_top = jnp.maximum(top, logits.max(axis=1))
            fade = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, shape, [0]))
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
            total = total * fade
            low = weights.astype(dtype)

            def finish():
                if config.alternate:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[stage])
                if config.alternate:
                    plgpu.barrier_wait(turn)

            if head_dim <= 128:
                total += weights.sum(axis=1)
                acc, total, new_top, low = lax.optimization_barrier(
                    (acc, total, new_top, low)
                )
                finish()
            else:
                finish()
                total += weights.sum(axis=1)

            def values(acc_ref):
                plgpu.wgmma(acc_ref, low, v_smem.at[stage])
                following_stage = lax.rem(step + 1, jnp.int32(config.stages))

                @pl.when(step + 1 < steps)
                def _():
                    plgpu.barrier_wait(k_ready.at[following_stage])

            acc = pl.run_state(values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_done.at[stage])
            return acc, new_top, total, following

        carry = (*softmax_start(head_dim), words_at(jnp.int32(0)))
        acc, top, total, _ = lax.fori_loop(0, steps, step_body, carry)
        pl.when(wg == 0)(take_turn)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        q_part[...] = acc.astype(dtype)
        lse_part[...] = jnp.where(empty, NEG_INF, top * LN_2 + jnp.log(total))
        plgpu.commit_smem()
        for part, inside in pieces(refs["out"]):
            plgpu.copy_smem_to_gmem(q_part.at[inside], part)
        plgpu.copy_smem_to_gmem(lse_part, refs["lse"].at[rows])
        plgpu.wait_smem_to_gmem(0)


def static_pairs(refs, all_blocks: int, block: int) -> int:
    """B * K, from the shape of the flattened blocks of all layers."""
    return refs["kv"].shape[0] // (all_blocks * block) // refs["layers"]


@in_32_bit
def block_sparse_attention_mosaic_gpu(
    operands: Prefill, *, config: Config | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp.

    Args:
      operands: queries, blocks and lists.
      config: settings; recorded or default ones if None.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: for sizes or dtypes that the kernel cannot tile, or without
        a Hopper device.
      ValueError: for a ``config`` that does not fit in shared memory.
    """
    require_attention_sizes(operands, operands.groups)
    head_dim, block = operands.head_dim, operands.block
    config = config or config_for(operands.groups, head_dim, block, operands.listed)
    if config.keys % block or config.shared_bytes(head_dim) > SHARED_BYTES - 4096:
        raise ValueError(
            f"{config} does not serve blocks of {block} tokens and head dim {head_dim}"
            " in 227 KiB of shared memory"
        )
    return where_finite(lambda operands: _call(operands, config), operands)


def _call(operands: Prefill, config: Config):
    q, kv, block_indices = operands.q, operands.kv, operands.block_indices
    batch, length, _, head_dim = q.shape
    layers, _, kv_heads, all_blocks, block, _, _ = kv.shape
    groups = operands.groups
    # At most 16 tokens a tile: small groups are padded to 8 rows.
    padded = max(ROWS // 16, next_power_of_two(groups))
    tokens = ROWS // padded
    tiles = cdiv(length, tokens)
    in_place = config.in_place and groups == padded and length == tiles * tokens
    query = q
    if not in_place:
        query = fold_queries(q, kv_heads, tiles * tokens, padded)
    query = query.reshape(-1, head_dim)
    inputs = {
        "layer": operands.layer.reshape(1),
        "start": operands.q_start,
        "q": query,
        "kv": kv.reshape(-1, 2 * head_dim),
    }
    if block_indices is not None:
        lists = unions_of(operands, tokens)
        per_step = config.keys // block
        width = lists.blocks.shape[-1]
        # Whole steps; what the padding fetches is block 0, which nobody lists there.
        grow = ((0, 0), (0, -width % per_step))
        flat = (batch * kv_heads * tiles, width)
        inputs["blocks"] = jnp.pad(lists.blocks.reshape(flat), grow)
        inputs["words"] = jnp.pad(lists.words.reshape(flat), grow)
        inputs["count"] = lists.count.reshape(-1)
    if operands.key_bias is not None:
        inputs["bias"] = operands.key_bias.reshape(-1)
    names = (*inputs, "out", "lse")

    def block_sparse_attention_mosaic_gpu(*refs):
        refs = dict(zip(names, refs, strict=True))
        refs["layers"] = layers
        refs["scale"] = operands.scale * LOG2_E
        _entry(
            *refs.values(),
            names=tuple(refs),
            config=config,
            head_dim=head_dim,
            block=block,
            dtype=q.dtype,
            tokens=tokens,
            kv_heads=kv_heads,
            tiles=tiles,
            all_blocks=all_blocks,
            in_place=in_place,
        )

    out, lse = plgpu.kernel(
        block_sparse_attention_mosaic_gpu,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, q.dtype),
            jax.ShapeDtypeStruct(query.shape[:1], jnp.float32),
        ),
        grid=(tiles, kv_heads, batch),
        grid_names=("tile", "k", "b"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())

    if in_place:
        out = out.reshape(q.shape)
    else:
        out = unfold_queries(out, q, kv_heads, tiles * tokens, padded)
    return (
        out,
        unfold_queries(lse, q, kv_heads, tiles * tokens, padded),
    )
