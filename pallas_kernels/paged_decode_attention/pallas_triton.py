"""Paged decode attention on Triton (compute capability 8.0 and newer).

Algorithm: the slots of a (row, kv head) are split over programs; each runs an online
softmax over its slots for all G query heads together, so that a slot is read once a
group, and writes a normalised partial output with its log-sum-exp. A second kernel
merges the parts. Grid: (splits, K, B).

Tiles: queries [max(16, G rounded up to a power of two), H], a slot's keys and values
[block, H] each. Loads of tokens beyond a slot's length are masked: they move no bytes
and bring no NaN.

Measured by the durations of all kernels in a profile, the merge among them, beside a
large device copy, reads and writes counted (jax 0.11.2, bfloat16, 32/2 heads, H = 128,
96 slots of 64, spread at most 0.6 %). One H100 (3,029 GB/s): batch 8 23.9 us, 69 %
(25.2 us and 66 % while XLA merged); batch 16 41.2 us, 81 %; 64 143.2 us, 93 %; batch 1
12.7 us, both with XLA's merge. One H200 (4,308 GB/s), with XLA's merge: batch 8
19.7 us, 59 %; batch 16 31.8 us, 73 %; batch 64 101.0 us, 92 %.

What bounds batch 8 (H100, ``benchmarks.decode_account``): 3.7 us whatever is read, then
50.3 MB at 2,790 GB/s, 92 % of the copy, then 1.6 us for the merge (XLA's two kernels
take 3.7). At the copy's own rate and without any merge it would be 20.3 us, 82 %: the
aim of 85 % is out of reach. Tried beside it: deeper pipelines read faster and start
later (5 stages: 5.2 us, then 3,010 GB/s; 23.7 us in all, and 44.8 at batch 16), two
slots a step of the loop 24.1 us, eight warps 24.7, two programs a multiprocessor 24.3,
one for every two 30.9.

Limits: H and block powers of two (16-256 and 16-128) with tiles of block x H of at
most 32 KiB. The back end is deprecated in
JAX; this file can be deleted with it.
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

from pallas_kernels._common.numerics import NEG_INF, cdiv, in_32_bit
from pallas_kernels._common.triton import (
    MIN_ROWS,
    dot,
    launch,
    next_power_of_two,
    require_launch,
    require_triton_sizes,
    softmax_end,
    softmax_start,
    softmax_step,
)
from pallas_kernels._common.triton_merge import merge_splits_triton
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.paged_decode_attention.operands import Decode


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      splits: programs that share the slots of one (row, kv head).
      num_warps: warps of a program.
      num_stages: depth of the load pipeline.
    """

    splits: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"splits is {self.splits}; it must be at least 1")
        require_launch(self.num_warps, self.num_stages)


def default_config(batch: int, kv_heads: int, listed: int) -> Config:
    """At most one program for each of 132 multiprocessors: more start later."""
    return Config(splits=max(1, min(132 // (batch * kv_heads), listed)))


def config_in_8_bits(batch: int, kv_heads: int, listed: int) -> Config:
    """For slots in 8 bits: four programs for each of 132 multiprocessors, or more.

    Their time goes into widening numbers, so all multiprocessors must have as much to
    do. One H200 (jax 0.11.2, 96 slots of 64, 32/2 heads, H = 128, loops of 64 calls):
    100 rows in three parts 147 us, as from 16 bits; in one 181, two 179, four 154,
    eight 151; 54 rows in two parts 99 us, four 103, from 16 bits 101. Tried beside it:
    eight warps 225 us, two warps 152 to 177, four stages 152; slots widened by their
    scales 198, all for 100 rows.
    """
    return Config(splits=max(1, min(cdiv(528, batch * kv_heads), listed)))


def config_for(batch: int, kv_heads: int, listed: int, head_dim: int) -> Config:
    """The recorded settings of this device kind, or the heuristic."""
    sizes = {"B": batch, "K": kv_heads, "P": listed, "H": head_dim}
    found = tuned_config("paged_decode_attention", "triton", sizes)
    return Config(**found) if found else default_config(batch, kv_heads, listed)


def _kernel(
    layer_ref,  # [1]
    slots_ref,  # [B, K, P] or None
    lengths_ref,  # [B, K, P] with slots, else [B]
    q_ref,  # [B N H]
    kv_ref,  # [L, B, K, C, block, 2 H]
    bias_ref,  # [L, B, K, C, block] or None
    scales_ref,  # [L, B, K, C, S] for slots in 8 bits, or None
    tail_ref,  # [L, B, K, block, 2 H] with scales
    tail_lengths_ref,  # [B] with scales
    out_ref,  # [B K splits G H]
    lse_ref,  # [B K splits G]
    *,
    groups: int,
    rows: int,
    head_dim: int,
    per_split: int,
    listed: int,
    scale: float,
):
    split, k, b = (pl.program_id(i) for i in range(3))
    block = kv_ref.shape[4]
    pair = b * pl.num_programs(1) + k
    layer = layer_ref[0]
    # Queries are read, and results written, in place: rows beyond G are masked.
    row = jnp.arange(rows)
    element = row[:, None] * head_dim + jnp.arange(head_dim)[None]
    real = jnp.broadcast_to((row < groups)[:, None], element.shape)
    query = plt.load(
        q_ref.at[jnp.where(real, pair * (groups * head_dim) + element, 0)],
        mask=real,
        other=0.0,
    )
    offset = jnp.arange(block)
    first = split * per_split
    last = jnp.minimum(first + per_split, listed)
    if slots_ref is None:
        # Slots after the row's last token hold nothing.
        last = jnp.minimum(last, cdiv(jnp.maximum(lengths_ref[b], 0), block))

    def body(j, running):
        if slots_ref is None:
            slot, length = j, lengths_ref[b] - j * block
        else:
            slot = slots_ref[b, k, j]
            length = jnp.where(slot < 0, 0, lengths_ref[b, k, j])
            slot = jnp.clip(slot, 0, kv_ref.shape[3] - 1)
        valid = offset < length

        def load(which):
            columns = pl.ds(which * head_dim, head_dim)
            at = kv_ref.at[layer, b, k, slot, :, columns]
            return plt.load(at, mask=valid[:, None], other=0)

        if scales_ref is not None:
            at = (layer, b, k, slot)
            return _stored_step(running, query, valid, load, scales_ref, at, scale)

        logits = dot(query, load(0).T) * scale
        if bias_ref is not None:
            at = bias_ref.at[layer, b, k, slot, :]
            logits = logits + plt.load(at, mask=valid, other=0.0)[None]
        logits = jnp.where(valid[None], logits, NEG_INF)
        return softmax_step(running, logits, lambda: load(1))

    start = softmax_start(rows, head_dim)
    if tail_ref is not None:
        grown = (offset < tail_lengths_ref[b]) & (split == 0)
        start = _tail_step(start, query, grown, tail_ref, (layer, b, k), scale)
    out, lse = softmax_end(lax.fori_loop(first, last, body, start))
    part = (pair * pl.num_programs(0) + split) * groups
    plt.store(
        out_ref.at[part * head_dim + element],
        out.astype(out_ref.dtype),
        mask=real,
    )
    plt.store(lse_ref.at[part + row], lse, mask=row < groups)


def _stored_step(running, query, valid, load, scales_ref, at, scale):
    """A slot in 8 bits.

    Its integers are exact in the queries' dtype, and K's scales multiply the queries as
    V's do the weights: those are fewer numbers than the slot's.
    """
    dim, block = query.shape[-1], valid.shape[0]
    of_k = plt.load(scales_ref.at[*at, pl.ds(0, dim)])
    of_v = plt.load(scales_ref.at[*at, pl.ds(dim, block)], mask=valid, other=0.0)
    scaled = (query.astype(jnp.float32) * of_k[None]).astype(query.dtype)
    logits = dot(scaled, load(0).astype(query.dtype).T) * scale
    logits = jnp.where(valid[None], logits, NEG_INF)
    return softmax_step(
        running, logits, lambda: load(1).astype(query.dtype), of_v[None]
    )


def _tail_step(running, query, valid, tail_ref, at, scale):
    """The block that grows, beside slots in 8 bits."""
    head_dim = query.shape[-1]

    def load(which):
        columns = pl.ds(which * head_dim, head_dim)
        return plt.load(tail_ref.at[*at, :, columns], mask=valid[:, None], other=0.0)

    logits = dot(query, load(0).T) * scale
    logits = jnp.where(valid[None], logits, NEG_INF)
    return softmax_step(running, logits, lambda: load(1))


@in_32_bit
def paged_decode_attention_triton(
    operands: Decode, *, config: Config | None = None, interpret: bool = False
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp.

    Args:
      operands: queries, slots and lists.
      config: settings; recorded or heuristic ones by default.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: for sizes Triton cannot tile, or without a CUDA device.
    """
    q, kv, slots = operands.q, operands.kv, operands.slots
    batch, heads, head_dim = q.shape
    kv_heads, groups, listed = operands.kv_heads, operands.groups, operands.listed
    require_triton_sizes(q.dtype, head_dim, operands.block, interpret)
    if config is None and operands.stored is not None:
        config = config_in_8_bits(batch, kv_heads, listed)
    config = config or config_for(batch, kv_heads, listed, head_dim)
    splits = min(config.splits, listed)
    parts = heads * batch * splits
    partial = q.dtype if splits == 1 else jnp.float32
    stored, tail = operands.stored, None
    if stored is not None:
        tail = stored.tail.reshape(*stored.tail.shape[:-2], 2 * head_dim)
    out, lse = launch(
        functools.partial(
            _kernel,
            groups=groups,
            rows=max(MIN_ROWS, next_power_of_two(groups)),
            head_dim=head_dim,
            per_split=cdiv(listed, splits),
            listed=listed,
            scale=operands.scale,
        ),
        operands.layer.reshape(1),
        slots,
        operands.lengths if slots is None else operands.slot_lengths,
        q.reshape(-1),
        kv.reshape(*kv.shape[:-2], 2 * head_dim),
        operands.key_bias,
        None if stored is None else stored.scales,
        tail,
        None if stored is None else stored.tail_lengths,
        grid=(splits, kv_heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((parts * head_dim,), partial),
            jax.ShapeDtypeStruct((parts,), jnp.float32),
        ),
        config=config,
        interpret=interpret,
        name="paged_decode_attention_triton",
    )
    if splits > 1:
        lead = (batch * kv_heads, splits, groups)
        out, lse = merge_splits_triton(
            out.reshape(*lead, head_dim),
            lse.reshape(lead),
            q.dtype,
            interpret=interpret,
        )
    out = out.reshape(batch, heads, head_dim)
    return out, lse.reshape(batch, heads)


__all__ = ["Config", "default_config", "paged_decode_attention_triton"]
