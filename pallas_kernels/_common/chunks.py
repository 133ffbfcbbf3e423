"""Chunks of keys and values out of a stack of layers, for the XLA forms of attention.

The layer's index is part of each slice and gather: no layer is copied out of the stack.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common.operands import Attended

type Chunk = tuple[
    Float[Array, "B K S H"], Float[Array, "B K S H"], Float[Array, "B K S"] | None
]


def consecutive(operands: Attended, start: Int[Array, ""], size: int) -> Chunk:
    """Keys, values and bias of ``size`` blocks from ``start`` on."""
    kv, layer, key_bias = operands.kv, operands.layer, operands.key_bias
    _, batch, kv_heads, _, block, _, head_dim = kv.shape

    def take(which):
        part = lax.dynamic_slice(
            kv,
            (layer, 0, 0, start, 0, which, 0),
            (1, batch, kv_heads, size, block, 1, head_dim),
        )
        return part.reshape(batch, kv_heads, size * block, head_dim)

    bias = None
    if key_bias is not None:
        bias = lax.dynamic_slice(
            key_bias, (layer, 0, 0, start, 0), (1, batch, kv_heads, size, block)
        ).reshape(batch, kv_heads, size * block)
    return take(0), take(1), bias


def listed(operands: Attended, blocks: Int[Array, "B K n"]) -> Chunk:
    """Keys, values and bias of listed blocks; a number outside stands for the last."""
    batch, kv_heads, size = blocks.shape
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]

    def take(x, *tail):
        part = x.at[operands.layer, row, head, blocks, :, *tail].get(mode="clip")
        keys = size * operands.block
        return part.reshape(batch, kv_heads, keys, *part.shape[4:])

    key_bias = operands.key_bias
    bias = None if key_bias is None else take(key_bias)
    return take(operands.kv, 0), take(operands.kv, 1), bias
