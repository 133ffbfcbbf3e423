"""The layer body: T tokens through one decoder layer. Written once.

A prefill tile (T tokens), a further turn and a decode step (T = 1) all run this
function; so do the scanned and the unrolled loop over layers, every selector, and
resident and offloaded caches. Its order is the architecture's: project, forecast for
the next layer and start its fetch, append to the cache, join this layer's fetch,
attend, MLP.
"""

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from sparda_jax.config import ModelConfig
from sparda_jax.inference.layer_store import (
    LayerSettings,
    LayerStore,
    TileState,
    TokenKV,
)
from sparda_jax.models.block import after_attention, before_attention
from sparda_jax.models.decoder import DecoderLayer
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.layers import rms_norm
from sparda_jax.models.rope import Rotation


def forecast_for_first_layer(
    h: Float[Array, "B T D"],
    norm: Float[Array, " D"],
    head: Float[Array, "D KH"],
    turn: Rotation,
    config: ModelConfig,
) -> Float[Array, "B T K H"]:
    """phi_0, which layer 0 makes of its own input (specification §4.2)."""
    x = rms_norm(h, norm, config.rms_norm_eps)
    return project_forecast(x, head, turn)


class LayerOutput(NamedTuple):
    """What a layer makes of a tile.

    Attributes:
      hidden: Hidden states [B, T, D].
      phi: Forecast for the next layer [B, T, K, H], or None.
      store: The cache with the tile's tokens.
    """

    hidden: Float[Array, "B T D"]
    phi: Float[Array, "B T K H"] | None
    store: LayerStore


class LayerMiddle(NamedTuple):
    """A layer between choosing blocks and attending to them.

    Attributes:
      hidden: The layer's input [B, T, D].
      q: Queries after RoPE [B, T, N, H].
      phi: Forecast for the next layer [B, T, K, H], or None.
      store: The cache, with what is to be fetched.
    """

    hidden: Float[Array, "B T D"]
    q: Float[Array, "B T N H"]
    phi: Float[Array, "B T K H"] | None
    store: LayerStore


def layer_before_fetch(
    layer: DecoderLayer,
    next_head: Float[Array, "D KH"] | None,
    h: Float[Array, "B T D"],
    phi: Float[Array, "B T K H"] | None,
    store: LayerStore,
    tile: TileState,
    settings: LayerSettings,
) -> LayerMiddle:
    """The layer up to the blocks that must be fetched; see `decoder_layer`."""
    config = settings.config
    x, q, k, v, key_bias = before_attention(layer, config, h, tile.turn)
    phi_next = None
    if next_head is not None:
        phi_next = project_forecast(x, next_head, tile.turn)
    new = TokenKV(k, v, key_bias)
    store = store.look_ahead(phi_next, tile, settings)
    store = store.append(new, tile, settings)
    store = store.plan(q, phi, tile, settings)
    return LayerMiddle(h, q, phi_next, store)


def layer_after_fetch(
    layer: DecoderLayer,
    middle: LayerMiddle,
    tile: TileState,
    settings: LayerSettings,
) -> LayerOutput:
    """The rest of the layer, which needs the fetched blocks; see `decoder_layer`."""
    h, q, phi_next, store = middle
    store = store.land(q, tile, settings)
    attended = store.attend(q, tile, settings)
    flat = attended.reshape(*h.shape[:2], -1)
    h = after_attention(layer, settings.config, h, flat)
    return LayerOutput(h, phi_next, store)


# Jitted for itself, so that an unrolled loop over layers traces and lowers it once.
@functools.partial(jax.jit, static_argnames="settings")
def decoder_layer(
    layer: DecoderLayer,
    next_head: Float[Array, "D KH"] | None,
    h: Float[Array, "B T D"],
    phi: Float[Array, "B T K H"] | None,
    store: LayerStore,
    tile: TileState,
    settings: LayerSettings,
) -> LayerOutput:
    """Runs one layer on one tile.

    Args:
      layer: The layer's weights.
      next_head: Forecast head that the next layer consumes, or None.
      h: Hidden states.
      phi: Forecasts of the layer before for this layer's selection, or None.
      store: The layer's cache, before the tile.
      tile: Where the tile stands.
      settings: The model and how to attend.
    """
    middle = layer_before_fetch(layer, next_head, h, phi, store, tile, settings)
    # The fence is the order that XLA's scheduler must keep: what the layer before sent
    # for is joined here, then the next layer's fetch starts, then this layer goes on.
    # Joined so late, a fetch runs beside the rest of its layer and beside the
    # projections and the scores of this one. Without the fence XLA puts start and done
    # side by side, and nothing overlaps.
    store, q = middle.store.fence(middle.q, settings)
    middle = middle._replace(q=q, store=store.fetch(settings))
    return layer_after_fetch(layer, middle, tile, settings)
