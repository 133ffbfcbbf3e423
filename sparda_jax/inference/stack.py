"""Tiles through the layers: what prefill and decode share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.cache.resident import KVCache
from sparda_jax.inference.layer_step import (
    LayerSettings,
    TileState,
    decoder_layer,
    forecast_for_first_layer,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.sparse.selection import budget_width


class BlockCounts(NamedTuple):
    """KV blocks read and KV blocks present, summed over tokens, kv heads and layers."""

    attended: Float[Array, ""]
    present: Float[Array, ""]

    @staticmethod
    def zero() -> "BlockCounts":
        """No blocks."""
        return BlockCounts(jnp.float32(0), jnp.float32(0))

    def plus(self, other: "BlockCounts") -> "BlockCounts":
        """Both together."""
        return BlockCounts(self.attended + other.attended, self.present + other.present)


class StackCarry(NamedTuple):
    """What travels through the layers.

    Attributes:
      hidden: Hidden states [B, T, D].
      phi: Forecasts of the layer before [B, T, K, H], or None.
      cache: The KV cache.
      attended: KV blocks read so far; stays 0 while all causal blocks are read.
      blocks: Captured block lists [L, B, K, T, P], or None.
    """

    hidden: Float[Array, "B T D"]
    phi: Float[Array, "B T K H"] | None
    cache: KVCache
    attended: Float[Array, ""]
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
    return StackCarry(h, phi, cache, jnp.float32(0), blocks)


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
    out = decoder_layer(
        layer,
        next_head,
        cut(carry.hidden),
        None if carry.phi is None else cut(carry.phi),
        layer_cache,
        index,
        tile,
        settings,
    )
    attended, lists, blocks = carry.attended, out.blocks, carry.blocks
    if lists is not None:
        valid = jnp.arange(size) < tile.count[:, None]
        picked = jnp.sum((lists >= 0) & valid[:, None, :, None], dtype=jnp.int32)
        attended = attended + picked.astype(jnp.float32)
    if blocks is not None:
        if lists is None:
            shape = (*blocks.shape[1:3], size, blocks.shape[-1])
            lists = _causal_lists(tile, shape, settings.sparse.block_size)
        at = (layer_index, 0, 0, first, 0)
        blocks = jax.lax.dynamic_update_slice(blocks, lists[None], at)
    return StackCarry(
        hidden=put(carry.hidden, out.hidden),
        phi=None if carry.phi is None else put(carry.phi, out.phi),
        cache=carry.cache.replace_layer(layer_index, out.cache),
        attended=attended,
        blocks=blocks,
    )


def block_counts(
    carry: StackCarry,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    width: int,
    settings: LayerSettings,
) -> BlockCounts:
    """Blocks read and present for `count` tokens from `start` on in every row."""
    config = settings.config
    token = jnp.arange(width)
    blocks = (start[:, None] + token) // settings.sparse.block_size + 1
    blocks = jnp.where(token < count[:, None], blocks, 0)
    present = jnp.sum(blocks.astype(jnp.float32))
    present = present * (config.num_kv_heads * config.num_layers)
    lists = settings.selector.lists_blocks(
        carry.cache.layers[0].num_blocks, settings.sparse
    )
    return BlockCounts(carry.attended if lists else present, present)
