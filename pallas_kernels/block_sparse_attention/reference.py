"""The definition of block-sparse causal attention, in plain float32 einsums."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common.numerics import (
    NEG_INF,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
)


@in_32_bit
def block_sparse_attention_reference(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "L B K M block 2 H"],
    q_start: Int[Array, " B"],
    block_indices: Int[Array, "B K T P"] | None,
    layer: Int[Array, ""],
    key_bias: Float[Array, "L B K M block"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention over every key, with the keys not allowed masked away.

    Materialises T x S logits: an oracle, not an implementation. Differentiable.

    Args:
      q: queries of T consecutive positions.
      kv: blocks of keys (0) and values (1).
      q_start: position of the first query of each row.
      block_indices: blocks that each token reads, -1 for padding; None for all.
      layer: index into the leading axis of ``kv``.
      key_bias: added to the scaled logits.
      scale: factor of the logits.

    Returns:
      Output and log-sum-exp, both float32.
    """
    batch, tokens, heads, head_dim = q.shape
    _, _, kv_heads, blocks, block, _, _ = kv.shape
    kv = kv[layer].astype(jnp.float32).reshape(batch, kv_heads, -1, 2, head_dim)
    keys = jnp.arange(blocks * block)
    positions = q_start[:, None] + jnp.arange(tokens)
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
    logits = scale * einsum_f32("btkgh,bksh->bktgs", query, key)
    if key_bias is not None:
        bias = key_bias[layer].reshape(batch, kv_heads, 1, 1, -1)
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
