"""The layer body: T tokens through one decoder layer. Written once.

A prefill tile (T tokens), a further turn and a decode step (T = 1) all run this
function; so do the scanned and the unrolled loop over layers, every selector, and
resident and offloaded caches. `view` is this layer's cache; what belongs to the next
layer stands beside it, in `lookahead`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.cache.offload_view import OffloadView
from sparda_jax.cache.prefetch import Lookahead
from sparda_jax.cache.resident_view import ResidentView
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.models.block import add_attention, add_mlp, before_attention
from sparda_jax.models.decoder import DecoderLayer
from sparda_jax.sparse.index import TokenKV

CacheView = ResidentView | OffloadView


class LayerBlock(NamedTuple):
    """A layer's weights.

    Attributes:
      weights: The layer's own.
      next_query: Weights of the query that the selector makes for the next layer, a
        Forecast head for one; or None.
      number: The layer's number.
    """

    weights: DecoderLayer
    next_query: Any | None
    number: int | Int[Array, ""]


class LayerMiddle(NamedTuple):
    """A layer between choosing blocks and attending to them.

    Attributes:
      hidden: The layer's input [B, T, D].
      q: Queries after RoPE [B, T, N, H].
      forecast: What it makes for the next layer's choice, or None.
      view: The layer's cache, its blocks chosen.
      lookahead: The next layer's fetch, planned.
      next_query: Weights of a query for the next layer that is still to be made, behind
        attention (`Selector.asks_late`); or None.
    """

    hidden: Float[Array, "B T D"]
    q: Float[Array, "B T N H"]
    forecast: Float[Array, "B T heads F"] | None
    view: CacheView
    lookahead: Lookahead
    next_query: Any | None


class LayerOutput(NamedTuple):
    """What a layer makes of a tile.

    Attributes:
      hidden: Hidden states [B, T, D].
      forecast: What it makes for the next layer's choice, or None.
      view: The layer's cache with the tile's tokens.
      lookahead: The next layer's fetch, under way.
    """

    hidden: Float[Array, "B T D"]
    forecast: Float[Array, "B T heads F"] | None
    view: CacheView
    lookahead: Lookahead


def layer_before_fetch(
    block: LayerBlock,
    h: Float[Array, "B T D"],
    forecast: Float[Array, "B T heads F"] | None,
    view: CacheView,
    lookahead: Lookahead,
    tile: TileState,
    settings: LayerSettings,
) -> LayerMiddle:
    """The layer up to the blocks that must be fetched; see `decoder_layer`."""
    tile, selector = tile.in_layer(block.number), settings.selector
    x, q, k, v, key_bias = before_attention(
        block.weights, settings.config, h, tile.rope_cos_sin
    )
    new, next_forecast, late = TokenKV(k, v, key_bias, q), None, None
    # Where nothing was made for this layer, nobody asks for the next one either.
    asked = forecast is not None
    if asked and selector.hands_on_scores:
        # They need this tile in this layer's index, and nothing of the next one's.
        view = view.append(new, tile, settings)
        next_forecast = jnp.swapaxes(view.own_scores(q, tile, settings), 1, 2)
    elif asked and selector.asks_late(settings.config):
        late = block.next_query
    elif asked and block.next_query is not None:
        # On a GPU XLA would join this product with that of the queries, which for one
        # token is as well, but in a prefill copies both weights side by side in every
        # tile. On a CPU the barrier would cost a copy of the whole prompt's states.
        apart = not tile.decoding and jax.default_backend() == "gpu"
        seen = jax.lax.optimization_barrier(x) if apart else x
        next_forecast = selector.next_query(block.next_query, seen, tile.rope_cos_sin)
    if late is None:
        lookahead = lookahead.plan_next(next_forecast, tile, settings)
        view, lookahead = view.behind(lookahead)
    if not (asked and selector.hands_on_scores):
        view = view.append(new, tile, settings)
    view = view.select(q, forecast, tile, settings)
    return LayerMiddle(h, q, next_forecast, view, lookahead, late)


def layer_after_fetch(
    block: LayerBlock, middle: LayerMiddle, tile: TileState, settings: LayerSettings
) -> LayerOutput:
    """The rest of the layer, which needs the fetched blocks; see `decoder_layer`."""
    tile = tile.in_layer(block.number)
    h, q, next_forecast, view, lookahead, late = middle
    view, lookahead = view.commit(q, lookahead, tile, settings)
    attended = view.attend(q, tile, settings)
    flat = attended.reshape(*h.shape[:2], -1)
    config, axis = settings.config, settings.axis
    h, x = add_attention(block.weights, config, h, flat, axis=axis)
    if late is not None:
        next_forecast = settings.selector.next_query(late, x, tile.rope_cos_sin)
        lookahead = view.shown_to(lookahead)
        lookahead = lookahead.plan_next(next_forecast, tile, settings)
        view, lookahead = view.behind(lookahead)
        # This layer's fetch has long been joined: the next one's runs beside the MLP.
        x, view, lookahead = view.order(x, lookahead, settings)
        lookahead = lookahead.start(settings)
    h = add_mlp(block.weights, config, h, x, axis=axis)
    return LayerOutput(h, next_forecast, view, lookahead)


# Jitted for itself, so that an unrolled loop over layers traces and lowers it once.
@functools.partial(jax.jit, static_argnames="settings")
def decoder_layer(
    block: LayerBlock,
    h: Float[Array, "B T D"],
    forecast: Float[Array, "B T heads F"] | None,
    view: CacheView,
    lookahead: Lookahead,
    tile: TileState,
    settings: LayerSettings,
) -> LayerOutput:
    """Runs one layer on one tile.

    Args:
      block: The layer's weights.
      h: Hidden states.
      forecast: What the layer before made for this layer's selection, or None.
      view: The layer's cache, before the tile.
      lookahead: The next layer, if this one shall look ahead for it.
      tile: Where the tile stands.
      settings: The model and how to attend.
    """
    middle = layer_before_fetch(block, h, forecast, view, lookahead, tile, settings)
    # Here this layer's fetch is joined, then the next one's starts, then the layer goes
    # on: the order that XLA's scheduler must keep.
    q, view, lookahead = middle.view.order(middle.q, middle.lookahead, settings)
    lookahead = lookahead.start(settings)
    middle = middle._replace(q=q, view=view, lookahead=lookahead)
    return layer_after_fetch(block, middle, tile, settings)
