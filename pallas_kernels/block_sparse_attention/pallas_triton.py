"""Block-sparse causal attention on Triton (compute capability 8.0 and newer).

Algorithm: a program owns a tile of consecutive tokens with all G query heads of one
kv head as rows. It walks over the union of its tokens' lists (``unions.py``), or over
all blocks up to its last position without lists, with an online softmax; a bit of the
union's word and the position decide what each row may read. Grid: (tiles, K, B).

Tiles: queries [tokens * G, H] with G rounded up to a power of two, keys and values
[block, H] each.

Measured on one H200 (jax 0.11.2, bfloat16, T = 131,072, 32/2 heads, H = 128, P = 96,
64 rows, tokens that agree in groups of 64; median of 5): 44.3 ms ±0.8 %, 291 TFLOP/s
on the selected work. At T = 16,384: 4.63 ms with 64 rows, 4.17 with 128 rows, 4 warps
and 2 stages, 4.98 to 5.41 with 8 warps.

Limits: H and block powers of two (16-256 and 16-128) with tiles of block x H of at
most 32 KiB. Runs behind a check that all
values are finite, and otherwise hands over to the XLA form, which keeps non-finite
values from rows that do not read them. The back end is deprecated in JAX; this file
can be deleted with it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
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
from pallas_kernels.block_sparse_attention.operands import Prefill
from pallas_kernels.block_sparse_attention.rows import fold_queries, unfold_queries
from pallas_kernels.block_sparse_attention.unions import unions_of, where_finite
from pallas_kernels.dispatch import tuned_config


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      rows: rows of a query tile (tokens times G), a power of two from 16.
      num_warps: warps of a program.
      num_stages: depth of the load pipeline.
    """

    rows: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        if self.rows < MIN_ROWS or self.rows & (self.rows - 1):
            raise ValueError(f"rows is {self.rows}; it must be a power of two >= 16")
        require_launch(self.num_warps, self.num_stages)


def config_for(groups: int, head_dim: int, listed: int | None) -> Config:
    """The recorded settings of this device kind, or the defaults."""
    sizes = {"G": groups, "H": head_dim, "P": listed}
    found = tuned_config("block_sparse_attention", "triton", sizes)
    return Config(**found) if found else Config(rows=64 if head_dim <= 128 else 32)


def _kernel(
    layer_ref,  # [1]
    start_ref,  # [B]
    blocks_ref,  # [B, K, tiles, U] or None
    words_ref,  # [B, K, tiles, U] or None
    count_ref,  # [B, K, tiles] or None
    q_ref,  # [B, K, tiles, rows, H]
    kv_ref,  # [L, B, K, M, block, 2 H]
    bias_ref,  # [L, B, K, M, block] or None
    out_ref,  # [B, K, tiles, rows, H]
    lse_ref,  # [B, K, tiles, rows]
    *,
    tokens: int,
    scale: float,
):
    tile, k, b = (pl.program_id(i) for i in range(3))
    all_blocks, block = kv_ref.shape[3:5]
    rows, head_dim = q_ref.shape[3:]
    layer = layer_ref[0]
    query = q_ref[b, k, tile]
    token = jnp.arange(rows) // (rows // tokens)
    first = start_ref[b] + tile * tokens
    position = first + token
    offset = jnp.arange(block)
    if blocks_ref is None:
        steps = jnp.clip(first + tokens, 0, all_blocks * block)
        steps = cdiv(steps, block)
    else:
        steps = count_ref[b, k, tile]

    def body(j, running):
        m = j if blocks_ref is None else blocks_ref[b, k, tile, j]

        def load(which):
            columns = pl.ds(which * head_dim, head_dim)
            return kv_ref[layer, b, k, m, :, columns]

        logits = dot(query, load(0).T) * scale
        if bias_ref is not None:
            logits = logits + bias_ref[layer, b, k, m, :][None]
        allowed = (m * block + offset)[None] <= position[:, None]
        if blocks_ref is not None:
            listed = (words_ref[b, k, tile, j] >> token) & 1
            allowed = allowed & (listed == 1)[:, None]
        logits = jnp.where(allowed, logits, NEG_INF)
        return softmax_step(running, logits, lambda: load(1))

    start = softmax_start(rows, head_dim)
    out, lse = softmax_end(lax.fori_loop(0, steps, body, start))
    out_ref[b, k, tile] = out.astype(out_ref.dtype)
    lse_ref[b, k, tile] = lse


@in_32_bit
def block_sparse_attention_triton(
    operands: Prefill, *, config: Config | None = None, interpret: bool = False
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Computes the output in the dtype of ``q`` and the float32 log-sum-exp.

    Args:
      operands: queries, blocks and lists.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: for sizes Triton cannot tile, or without a CUDA device.
    """
    head_dim = operands.head_dim
    require_triton_sizes(operands.q.dtype, head_dim, operands.block, interpret)
    config = config or config_for(operands.groups, head_dim, operands.listed)
    return where_finite(
        lambda operands: _call(operands, config=config, interpret=interpret), operands
    )


def _call(operands: Prefill, *, config: Config, interpret: bool):
    q = operands.q
    batch, length, _, head_dim = q.shape
    kv_heads = operands.kv_heads
    padded = next_power_of_two(operands.groups)
    # Short calls take a small tile; a word holds 31 tokens, of which 16 are used.
    tokens = max(1, min(config.rows // padded, 16, next_power_of_two(length)))
    rows = max(MIN_ROWS, tokens * padded)
    padded = rows // tokens
    tiles = cdiv(length, tokens)
    query = fold_queries(q, kv_heads, tiles * tokens, padded)
    query = query.reshape(batch, kv_heads, tiles, rows, head_dim)
    lists = (None, None, None)
    if operands.block_indices is not None:
        lists = unions_of(operands, tokens)
    out, lse = launch(
        functools.partial(_kernel, tokens=tokens, scale=operands.scale),
        operands.layer.reshape(1),
        operands.q_start,
        *lists,
        query,
        operands.kv.reshape(*operands.kv.shape[:-2], 2 * head_dim),
        operands.key_bias,
        grid=(tiles, kv_heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, q.dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
        ),
        config=config,
        interpret=interpret,
        name="block_sparse_attention_triton",
    )

    return (
        unfold_queries(out, q, kv_heads, tiles * tokens, padded),
        unfold_queries(lse, q, kv_heads, tiles * tokens, padded),
    )
