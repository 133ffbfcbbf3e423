"""Forecast heads: the fourth projection, which selects the *next* layer's KV blocks.

Layer l's Forecast selects for layer l + 1; this module is where that is written down.
A head belongs to the layer that *consumes* its forecast:

    heads[0]      the reference's q_curr_proj of layer 0: layer 0 selects for itself
    heads[l]      the reference's q_future_proj of layer l - 1,  l = 1 … L-1

so every head is used and trained, L in all. (The reference also allocates the last
layer's q_future_proj, which feeds nothing.) With x_l the normalised input of layer l:

    forecast_0     = RoPE(heads[0]   · x_0)
    forecast_{l+1} = RoPE(heads[l+1] · x_l)          at the token's own position

and forecast_l is scored against layer l's own compressed keys (docs/algorithm.md §4.2).

A head makes R queries for each kv head (`ModelConfig.forecast_queries`). The
reference's make one, whose raw products with the keys rank the blocks. One vector
cannot stand for G query heads whose softmaxes are summed, though: with R > 1 a forecast
is scored as own queries are, by the sum of R softmaxes, and R = G is a guess at every
query head. Queries of a kv head stand next to each other.

Heads may read what layer l's MLP reads in the place of x_l, for l ≥ 0 and a forecast of
l + 1 (`ModelConfig.forecast_reads`): they know the layer's attention then, and are made
behind it. Layer 0's own still reads x_0.
"""

import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparda_jax.models.layers import matmul
from sparda_jax.models.rope import RopeCosSin, apply_rope


class Forecast(nnx.Param):
    """A Forecast weight. `nnx.Optimizer(model, tx, wrt=Forecast)` trains only these."""


def project_forecast(
    x: Float[Array, "B T D"],
    head: Float[Array, "D KRH"],
    rope_cos_sin: RopeCosSin,
) -> Float[Array, "B T KR H"]:
    """forecast = RoPE(head · x), R queries per kv head (docs/algorithm.md §4.2)."""
    head_dim = 2 * rope_cos_sin.cos.shape[-1]
    forecast = matmul(x, head).reshape(*x.shape[:2], -1, head_dim)
    return apply_rope(forecast, rope_cos_sin)


def query_sets(group_size: int, queries: int) -> list[slice]:
    """G query heads in R runs whose lengths differ by one at most."""
    edges = [group_size * index // queries for index in range(queries + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


def heads_from_query(
    query_weights: Float[Array, "D NH"],
    num_kv_heads: int,
    head_dim: int,
    queries: int = 1,
) -> Float[Array, "D KRH"]:
    """A training-free head: means of the consuming layer's query heads.

    heads[l] = mean over the G query heads of each kv head of layer l's W_q. For l ≥ 1
    the forecast differs from the layer's own mean query only by reading the input of
    the layer before. The group mean divides all scores of a row alike, so it ranks
    blocks as the group sum does. With R queries each is the mean of its run of heads
    (`query_sets`), and with R = G the head is W_q itself.
    """
    hidden = query_weights.shape[0]
    grouped = query_weights.reshape(hidden, num_kv_heads, -1, head_dim)
    sets = query_sets(grouped.shape[2], queries)
    means = [jnp.mean(grouped[:, :, one], axis=2) for one in sets]
    return jnp.stack(means, axis=2).reshape(hidden, -1)
