"""Tiles through the layers: what prefill and decode share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.cache.resident import KVCache
from sparda_jax.inference.layer_step import (
    BlockCounts,
    LayerSettings,
    TileState,
    decoder_layer,
    forecast_for_first_layer,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.sparse.selection import budget_width


class Rope(NamedTuple):
    """Rotary frequencies of a request: inv_freq [H/2] and the scale of cos and sin."""

    inv_freq: Float[Array, " half"]
    scale: Float[Array, ""]


class StackCarry(NamedTuple):
    """What travels through the layers.

    Attributes:
      hidden: Hidden states [B, T, D].
      phi: Forecasts of the layer before [B, T, K, H], or None.
      cache: The KV cache.
      counts: Blocks read and present so far.
      blocks: Captured block lists [L, B, K, T, P], or None.
    """

    hidden: Float[Array, "B T D"]
    phi: Float[Array, "B T K H"] | None
    cache: KVCache
    counts: BlockCounts
    blocks: Int[Array, "L B K T P"] | None


def start_stack(
    model: Decoder,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    tile: TileState,
    settings: LayerSettings,
    *,
    capture: bool,
) -> StackCarry:
    """Embeds the tokens and makes layer 0's own forecast."""
    h = embed(model, tokens, model.embedding[...].dtype)
    phi = blocks = None
    if settings.selector.needs_forecast:
        norm, head = model.first_attention_norm(), model.forecast_head(0)
        phi = forecast_for_first_layer(h, norm, head, tile, settings.config)
    if capture:
        config = settings.config
        width = budget_width(settings.sparse, cache.layers[0].num_blocks)
        shape = (config.num_layers, tokens.shape[0], config.num_kv_heads)
        blocks = jnp.full((*shape, tokens.shape[1], width), -1, jnp.int32)
    return StackCarry(h, phi, cache, BlockCounts.zero(), blocks)


def _causal_lists(
    tile: TileState, shape: tuple[int, ...], block_size: int
) -> Int[Array, "B K T P"]:
    """The lists that `None` stands for: every block up to the row's own."""
    own = (tile.positions(shape[2]) // block_size)[:, None, :, None]
    block = jnp.arange(shape[-1])
    return jnp.broadcast_to(jnp.where(block <= own, block, -1), shape)


def layer_on_tile(
    model: Decoder,
    carry: StackCarry,
    layer: DecoderLayer,
    layer_index: int | Int[Array, ""],
    first: int | Int[Array, ""],
    size: int,
    tile: TileState,
    settings: LayerSettings,
) -> StackCarry:
    """Runs one layer on the tokens first … first + size − 1 of the carry."""

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

    def put(x: Array, piece: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, piece, first, axis=1)

    next_head = None
    if settings.selector.needs_forecast:
        next_head = model.forecast_head(layer_index + 1)
    layer_cache, index = carry.cache.layer(layer_index)
    hidden, phi, layer_cache, lists, counts = decoder_layer(
        layer,
        next_head,
        cut(carry.hidden),
        None if carry.phi is None else cut(carry.phi),
        layer_cache,
        index,
        tile,
        settings,
    )
    blocks = carry.blocks
    if blocks is not None:
        if lists is None:
            shape = (*blocks.shape[1:3], size, blocks.shape[-1])
            lists = _causal_lists(tile, shape, settings.sparse.block_size)
        at = (layer_index, 0, 0, first, 0)
        blocks = jax.lax.dynamic_update_slice(blocks, lists[None], at)
    return StackCarry(
        hidden=put(carry.hidden, hidden),
        phi=None if carry.phi is None or phi is None else put(carry.phi, phi),
        cache=carry.cache.replace_layer(layer_index, layer_cache),
        counts=carry.counts + counts,
        blocks=blocks,
    )
