"""The definition of paged decode attention, in plain float32 einsums."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import (
    NEG_INF,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
)
from pallas_kernels.commit_blocks.int8 import decoded
from pallas_kernels.paged_decode_attention.operands import Decode


@in_32_bit
def paged_decode_attention_reference(
    operands: Decode,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Softmax attention over every slot, with the slots not listed masked away.

    Materialises logits of every slot: an oracle, not an implementation.

    Returns:
      Output and log-sum-exp, both float32.
    """
    q, layer, slots = operands.q, operands.layer, operands.slots
    batch, heads, head_dim = q.shape
    kv_heads, capacity, block = operands.kv.shape[2:5]
    kv = operands.kv[layer]
    if operands.stored is not None:
        kv = decoded(kv, operands.stored.scales[layer], jnp.float32)
    kv = kv.astype(jnp.float32)
    offset = jnp.arange(block)
    if slots is None:
        assert operands.lengths is not None
        position = jnp.arange(capacity)[:, None] * block + offset
        valid = position < operands.lengths[:, None, None, None]
    else:
        assert operands.slot_lengths is not None
        listed = slots[..., None] == jnp.arange(capacity)  # B K P C
        length = jnp.where(listed, operands.slot_lengths[..., None], 0)
        length = length.max(2)  # B K C
        valid = offset < length[..., None]
    valid = jnp.broadcast_to(valid, (batch, kv_heads, capacity, block))
    if operands.stored is not None:
        tail = operands.stored.tail[layer][:, :, None].astype(jnp.float32)
        kv = jnp.concatenate((kv, tail), axis=2)
        grown = offset < operands.stored.tail_lengths[:, None]
        grown = jnp.broadcast_to(grown[:, None, None], (batch, kv_heads, 1, block))
        valid = jnp.concatenate((valid, grown), axis=2)
    query = q.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim)
    logits = operands.scale * einsum_f32("bkgh,bkcsh->bkgcs", query, kv[..., 0, :])
    if operands.key_bias is not None:
        logits = logits + operands.key_bias[layer][:, :, None]
    logits = jnp.where(valid[:, :, None], logits, NEG_INF)
    top = finite_or_zero(logits.max((-2, -1)))
    weights = jnp.exp(logits - top[..., None, None])
    total = weights.sum((-2, -1))
    values = jnp.where(valid[..., None], kv[..., 1, :], 0.0)
    out = einsum_f32("bkgcs,bkcsh->bkgh", weights, values)
    out = jnp.where(total[..., None] > 0, out / total[..., None], 0.0)
    lse = jnp.where(total > 0, top + jnp.log(total), NEG_INF)
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads)
