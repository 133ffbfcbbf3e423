"""The distillation loss of one layer, streamed over tiles of query tokens.

What the teacher chose is also where the layer attends, so one pass over the tiles makes
the loss, its gradient with respect to the forecast, and the block lists. No score that
is larger than a tile's is ever held (docs/algorithm.md §7.8).

    tiles       cutting rows into tiles, and running them one after the other
    teacher     what a tile learns from, and where it attends
    objectives  how far the forecasts are from it
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig
from train.config import LossConfig
from train.objectives import forecast_routing, row_losses, row_weights
from train.teacher import Kernels, layer_keys, partition_sparse, teach
from train.tiles import (
    KERNEL_POOL,
    SEGMENTS,
    Documents,
    attend_listed,
    head_scores,
    join_tiles,
    kernel_tile_size,
    num_blocks,
    padded_heads,
    stream_tiles,
    tile_queries,
    tile_size,
)

# Where a kernel makes the teacher, tiles are large and there is little to save.
_KERNEL_SEGMENTS = 2


class LayerLoss(NamedTuple):
    """Loss of one layer.

    Attributes:
      total: Sum over rows of weight · KL.
      weight: Sum of the weights, over tokens and kv heads: `total / weight` is the
        layer's loss.
      routing: Block lists for the layer's attention, −1 padded.
      d_forecast: d total / d forecast, float32, or None if it was not asked for.
      attended: What attention over `routing` gives, or None if it was not asked for.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    routing: Int[Array, "B K T P"]
    d_forecast: Float[Array, "B T KR H"] | None
    attended: Float[Array, "B T N H"] | None = None


def distill_layer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    forecast: Float[Array, "B T KR H"],
    documents: Documents,
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
    with_gradient: bool,
    v: Float[Array, "B T K H"] | None = None,
    kernels: Kernels = (),
) -> LayerLoss:
    """Loss, block lists and, if wanted, the gradient for one layer's forecasts.

    Args:
      q: The layer's queries after RoPE.
      k: Its keys after RoPE.
      forecast: What the layer before (layer 0: it itself) forecast for it, after RoPE.
      documents: Which tokens belong together.
      key_bias: NOSA's c per token, or None.
      sparse: Block geometry and budget. With `mask_future_blocks=False` (parity with
        the reference) the lists may hold what the reference's do.
      loss: Variant of the loss.
      with_gradient: Also return d total / d forecast.
      v: Values, to attend as well: a tile's scores then serve the teacher and
        attention, which masks what is not listed. Worth it where a row is only a few
        times the budget.
      kernels: Kernels that may make a fine teacher aligned by the maximum
        (`kernel_cells`), where every row is one document and `v` is not given.

    Memory is that of one tile's scores. Source: docs/algorithm.md §5.2-5.5, §7.8.
    """
    sparse = dataclasses.replace(sparse, dense_len=-1)
    batch, tokens, heads, _ = q.shape
    keys = layer_keys(k, documents, key_bias, sparse=sparse, loss=loss)
    served = loss.teacher == "fine" and loss.align == "max" and v is None
    kernels = kernels if served and sparse.kernel_stride % KERNEL_POOL == 0 else ()
    if kernels:
        size = loss.tile or kernel_tile_size(batch, tokens, k.shape[2])
    else:
        size = loss.tile or tile_size(batch, tokens, heads, jax.default_backend())
    pure = partition_sparse(sparse, key_bias=key_bias is not None)
    count = num_blocks(tokens, sparse)
    slots = min(pure.largest_budget, count)
    width = min(sparse.largest_budget, count)
    cut = tile_queries(q, forecast, documents, size)[1]
    plain = values = bias = None
    if v is not None:
        plain, values = padded_heads(k, sparse), padded_heads(v, sparse)
        bias = None if key_bias is None else padded_heads(key_bias, sparse)

    def one_tile(index: Int[Array, ""], reach: int):
        queries, near = cut(index), keys.before(reach, loss, sparse)
        scores = None if plain is None else head_scores(queries.q, plain[:, :, :reach])
        teacher = teach(
            queries,
            near,
            sparse=sparse,
            loss=loss,
            token_scores=scores,
            kernels=kernels,
        )
        weight = row_weights(queries, sparse=sparse, loss=loss)

        def total(forecast: Array) -> Array:
            rows = row_losses(
                queries._replace(forecast=forecast),
                near,
                teacher,
                slots=slots,
                sparse=sparse,
                loss=loss,
            )
            return jnp.sum(rows * weight[:, None])

        if with_gradient:
            value, d_forecast = jax.value_and_grad(total)(queries.forecast)
        else:
            value, d_forecast = total(queries.forecast), None
        routing = teacher.routing
        if loss.on_policy:
            routing = forecast_routing(queries, near, sparse=sparse)
        attended = None
        if scores is not None and values is not None:
            if bias is not None:
                scores = scores + bias[:, :, None, None, :reach]
            attended = attend_listed(
                scores, values[:, :, :reach], routing, queries, sparse
            )
        missing = width - routing.shape[-1]
        routing = jnp.pad(routing, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)
        return value, jnp.sum(weight), routing, d_forecast, attended

    value, weight, routing, d_forecast, attended = stream_tiles(
        one_tile,
        tokens=tokens,
        size=size,
        sparse=sparse,
        segments=_KERNEL_SEGMENTS if kernels else SEGMENTS,
    )
    return LayerLoss(
        total=jnp.sum(value),
        weight=jnp.sum(weight) * k.shape[2],
        routing=join_tiles(routing, 2, tokens),
        d_forecast=None if d_forecast is None else join_tiles(d_forecast, 1, tokens),
        attended=None if attended is None else join_tiles(attended, 1, tokens),
    )


def distillation_loss(
    forecast: Float[Array, "B T KR H"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    documents: Documents,
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
) -> Float[Array, ""]:
    """The layer's loss as a function of `forecast` alone, for `jax.grad`.

    Differentiating it keeps no scores: the tiles' gradients are made on the way.
    """

    def run(forecast: Array, *, with_gradient: bool) -> tuple[Array, Array | None]:
        out = distill_layer(
            q,
            k,
            forecast,
            documents,
            key_bias,
            sparse=sparse,
            loss=loss,
            with_gradient=with_gradient,
        )
        weight = jnp.maximum(out.weight, 1.0)
        d_forecast = None if out.d_forecast is None else out.d_forecast / weight
        return out.total / weight, d_forecast

    @jax.custom_vjp
    def value(forecast: Array) -> Array:
        return run(forecast, with_gradient=False)[0]

    def forward(forecast: Array) -> tuple[Array, Array]:
        mean, d_forecast = run(forecast, with_gradient=True)
        assert d_forecast is not None
        return mean, d_forecast

    def backward(d_forecast: Array, cotangent: Array) -> tuple[Array]:
        return ((d_forecast * cotangent).astype(forecast.dtype),)

    value.defvjp(forward, backward)
    return value(forecast)
