"""The definition of block scores and of the choice, in plain float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import (
    NEG_INF,
    einsum_f32,
    finite_or_zero,
    in_32_bit,
)
from pallas_kernels.block_scores.operands import Scoring


@in_32_bit
def block_scores_reference(
    operands: Scoring,
) -> tuple[Float[Array, "B K T M"], Float[Array, "B T N"]]:
    """Scores every block; materialises T x W: an oracle, not an implementation.

    Returns:
      Scores, and the log-sum-exp of each head's logits (-inf where nothing is
      visible), both float32.
    """
    query, rule = operands.query, operands.rule
    q_start, num_windows = operands.q_start, operands.num_windows
    batch, tokens, heads, head_dim = query.shape
    keys = operands.compressed_keys[operands.layer].astype(jnp.float32)
    kv_heads, windows = keys.shape[1:3]
    position = q_start[:, None] + jnp.arange(tokens)  # B T
    window = jnp.arange(windows)
    seen = rule.visible(window, position[..., None]) & (
        window < num_windows[:, None, None]
    )
    seen = seen[:, None, None]  # B 1 1 T W
    query = query.astype(jnp.float32).reshape(batch, tokens, kv_heads, -1, head_dim)
    readable = seen.any((1, 2, 3))[:, None, :, None]
    keys = jnp.where(readable, keys, 0.0)
    logits = rule.scale * einsum_f32("btkgh,bkwh->bkgtw", query, keys)
    logits = jnp.where(seen, logits, NEG_INF)
    top = finite_or_zero(logits.max(-1, initial=NEG_INF))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1)
    lse = jnp.where(total > 0, top + jnp.log(total), NEG_INF)
    if rule.softmax:
        total = jnp.where(total > 0, total, 1.0)
        scores = (weights / total[..., None]).sum(2)
        # A window of the row that is not visible has weight 0; one that does not
        # exist has no score.
        exists = window < num_windows[:, None, None, None]
        scores = jnp.where(exists, scores, NEG_INF)
    else:
        scores = logits.max(2)
    pooled = []
    for block in range(rule.blocks):
        first = block * rule.per_block
        low, high = max(0, first - rule.before), min(windows, first + rule.per_block)
        part = scores[..., low:high]
        pooled.append(part.max(-1, initial=NEG_INF))
    scores = rule.force(
        jnp.stack(pooled, -1), jnp.arange(rule.blocks), position[:, None, :, None]
    )
    lse = jnp.moveaxis(lse, 3, 1).reshape(batch, tokens, heads)
    return scores, lse
