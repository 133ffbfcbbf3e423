"""Forecast heads: the fourth projection, which selects the *next* layer's KV blocks.

Layer l's Forecast selects for layer l + 1; this module is where that is written down.
A head belongs to the layer that *consumes* its forecast:

    heads[0]      the reference's q_curr_proj of layer 0: layer 0 selects for itself
    heads[l]      the reference's q_future_proj of layer l - 1,  l = 1 … L-1

so every head is used and trained, L in all. (The reference also allocates the last
layer's q_future_proj, which feeds nothing.) With x_l the normalised input of layer l:

    forecast_0     = RoPE(heads[0]   · x_0)
    forecast_{l+1} = RoPE(heads[l+1] · x_l)          at the token's own position

and forecast_l is scored against layer l's own compressed keys (specification §4.2).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparda_jax.models.layers import matmul
from sparda_jax.models.rope import RopeCosSin, apply_rope


class Forecast(nnx.Param):
    """A Forecast weight. `nnx.Optimizer(model, tx, wrt=Forecast)` trains only these."""


def project_forecast(
    x: Float[Array, "B T D"],
    head: Float[Array, "D KH"],
    rope_cos_sin: RopeCosSin,
) -> Float[Array, "B T K H"]:
    """forecast = RoPE(head · x), one vector per kv head (specification §4.2)."""
    head_dim = 2 * rope_cos_sin.cos.shape[-1]
    forecast = matmul(x, head).reshape(*x.shape[:2], -1, head_dim)
    return apply_rope(forecast, rope_cos_sin)


def heads_from_query(
    query_weights: Float[Array, "D NH"], num_kv_heads: int, head_dim: int
) -> Float[Array, "D KH"]:
    """A training-free head: the group mean of the consuming layer's query heads.

    heads[l] = mean over the G query heads of each kv head of layer l's W_q. For l ≥ 1
    the forecast differs from the layer's own mean query only by reading the input of
    the layer before. The group mean divides all scores of a row alike, so it ranks
    blocks as the group sum does.
    """
    hidden = query_weights.shape[0]
    grouped = query_weights.reshape(hidden, num_kv_heads, -1, head_dim)
    return jnp.mean(grouped, axis=2).reshape(hidden, num_kv_heads * head_dim)
