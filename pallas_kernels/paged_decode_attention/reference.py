"""The definition of paged decode attention, in plain float32 einsums."""

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
def paged_decode_attention_reference(
    q: Float[Array, "B N H"],
    kv: Float[Array, "L B K C block 2 H"],
    slots: Int[Array, "B K P"] | None,
    slot_lengths: Int[Array, "B K P"] | None,
    lengths: Int[Array, " B"] | None,
    layer: Int[Array, ""],
    key_bias: Float[Array, "L B K C block"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Softmax attention over every slot, with the slots not listed masked away.

    Materialises logits of every slot: an oracle, not an implementation.

    Args:
      q: queries.
      kv: slots of keys (0) and values (1).
      slots: listed slots, -1 for padding; None for all of them.
      slot_lengths: valid tokens of each listed slot.
      lengths: valid tokens of the row when ``slots`` is None.
      layer: index into the leading axis of ``kv``.
      key_bias: added to the scaled logits.
      scale: factor of the logits.

    Returns:
      Output and log-sum-exp, both float32.
    """
    batch, heads, head_dim = q.shape
    _, _, kv_heads, capacity, block, _, _ = kv.shape
    kv = kv[layer].astype(jnp.float32)
    offset = jnp.arange(block)
    if slots is None:
        assert lengths is not None
        position = jnp.arange(capacity)[:, None] * block + offset
        valid = position < lengths[:, None, None, None]
    else:
        assert slot_lengths is not None
        listed = slots[..., None] == jnp.arange(capacity)  # B K P C
        length = jnp.where(listed, slot_lengths[..., None], 0).max(2)  # B K C
        valid = offset < length[..., None]
    valid = jnp.broadcast_to(valid, (batch, kv_heads, capacity, block))
    query = q.astype(jnp.float32).reshape(batch, kv_heads, -1, head_dim)
    logits = scale * einsum_f32("bkgh,bkcsh->bkgcs", query, kv[..., 0, :])
    if key_bias is not None:
        logits = logits + key_bias[layer][:, :, None]
    logits = jnp.where(valid[:, :, None], logits, NEG_INF)
    top = finite_or_zero(logits.max((-2, -1)))
    weights = jnp.exp(logits - top[..., None, None])
    total = weights.sum((-2, -1))
    values = jnp.where(valid[..., None], kv[..., 1, :], 0.0)
    out = einsum_f32("bkgcs,bkcsh->bkgh", weights, values)
    out = jnp.where(total[..., None] > 0, out / total[..., None], 0.0)
    lse = jnp.where(total > 0, top + jnp.log(total), NEG_INF)
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads)
