"""Tiles of the Mosaic GPU kernels, and the keys laid out for them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._common.mosaic import WARPGROUP_ROWS
from pallas_kernels._common.numerics import cdiv
from pallas_kernels.block_scores.rule import Rule

COMPUTE = 2  # warpgroups that compute
TOKENS = COMPUTE * WARPGROUP_ROWS  # of a tile of queries
BLOCKS = 64  # of a tile of scores


def product(q_ref, k_ref, columns: int):
    """Rows of queries times a tile of keys, float32."""

    def products(acc_ref):
        plgpu.wgmma(acc_ref, q_ref, k_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(products, plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32))


class Keys(NamedTuple):
    """A layer's compressed keys in the two orders that the kernels read.

    Attributes:
      by_block: for each block the keys of its windows, one after the other.
      by_window: the keys as they are, W rounded up to a multiple of 8.
      windows: W.
    """

    by_block: Float[Array, "BKrows offsetsH"]
    by_window: Float[Array, "BK padded H"]
    windows: int


def lay_out(compressed_keys, layer, rule: Rule) -> Keys:
    """Takes the layer's keys out of the stack, in both orders."""
    keys = compressed_keys[layer]
    batch, kv_heads, windows, head_dim = keys.shape
    padded = jnp.pad(keys, ((0, 0), (0, 0), (0, -windows % 8), (0, 0)))
    padded = padded.reshape(batch * kv_heads, -1, head_dim)
    rows = cdiv(rule.blocks, BLOCKS) * BLOCKS
    keys = keys[:, :, : rows * rule.per_block]
    after = rows * rule.per_block - keys.shape[2]
    keys = jnp.pad(keys, ((0, 0), (0, 0), (rule.before, after), (0, 0)))
    parts = [keys[:, :, i :: rule.per_block][:, :, :rows] for i in range(rule.offsets)]
    by_block = jnp.concatenate(parts, -1).reshape(batch * kv_heads * rows, -1)
    return Keys(by_block, padded, windows)
