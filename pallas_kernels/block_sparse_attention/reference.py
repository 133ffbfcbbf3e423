"""The definition of block-sparse causal attention, in plain float32 einsums."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import (
    NEG_INF,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
)
from pallas_kernels.block_sparse_attention.operands import Prefill


@in_32_bit
def block_sparse_attention_reference(
    operands: Prefill,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention over every key, with the keys not allowed masked away.

    Materialises T x S logits: an oracle, not an implementation. Differentiable.

    Returns:
      Output and log-sum-exp, both float32.
    """
    q, layer, block_indices = operands.q, operands.layer, operands.block_indices
    batch, tokens, heads, head_dim = q.shape
    kv_heads, blocks, block = operands.kv.shape[2:5]
    kv = operands.kv[layer].astype(jnp.float32)
    kv = kv.reshape(batch, kv_heads, -1, 2, head_dim)
    keys = jnp.arange(blocks * block)
    positions = operands.q_start[:, None] + jnp.arange(tokens)
    allowed = keys <= positions[..., None]  # B T S
    allowed = allowed[:, None]
    if block_indices is not None:
        listed = (block_indices[..., None] == jnp.arange(blocks)).any(-2)  # B K T M
        allowed = allowed & listed[..., keys // block]
    allowed = jnp.broadcast_to(allowed, (batch, kv_heads, tokens, keys.size))
    readable = allowed.any(2)[..., None]  # what no token may read is never touched
    query = q.astype(jnp.float32).reshape(batch, tokens, kv_heads, -1, head_dim)
    key = jnp.where(readable, kv[..., 0, :], 0.0)
    value = jnp.where(readable, kv[..., 1, :], 0.0)
    logits = operands.scale * einsum_f32("btkgh,bksh->bktgs", query, key)
    if operands.key_bias is not None:
        bias = operands.key_bias[layer].reshape(batch, kv_heads, 1, 1, -1)
        logits = logits + jnp.where(readable[..., 0][:, :, None, None], bias, 0.0)
    logits = jnp.where(allowed[:, :, :, None], logits, NEG_INF)
    top = finite_or_zero(logits.max(-1))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = einsum_f32("bktgs,bksh->bktgh", weights, value) / total[..., None]
    lse = jnp.where(empty, NEG_INF, top + jnp.log(total))
    out = out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, head_dim)
    return out, lse.transpose(0, 2, 1, 3).reshape(batch, tokens, heads)
