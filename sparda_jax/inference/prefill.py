"""Layer-major prefill: one pass over the layers, query tiles inside each layer.

A layer runs tile after tile, each appending its keys before it attends, so scratch is
one tile's however long the prompt is. How many tiles run is decided at run time from
the longest row: lengths can be bucketed and padding costs next to nothing.

An offloaded layer runs on a scratch cache of one layer, into which what its rows hold
from before is streamed, and leaves for the host when its tiles are done: the device
holds one layer's KV, the hidden states of the prompt and a tile's scratch. A layer that
evicts runs on such a scratch cache too, and leaves in its place what it keeps.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparda_jax.cache.evict import Scratch, keep_listed, new_scratch, whole_layer
from sparda_jax.cache.offload import (
    OffloadCache,
    load_layer,
    scratch_kv,
    write_back_layer,
)
from sparda_jax.cache.prefetch import Lookahead
from sparda_jax.cache.resident import KVCache, LayerCache, end_prefill
from sparda_jax.cache.resident_view import ResidentView
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.inference.stack import (
    Cache,
    LayerActivations,
    StackCarry,
    is_first,
    layer_block,
    run_tile,
    start_stack,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, run_layers
from sparda_jax.models.rope import Rope, RopeCosSin, rope_cos_sin_at


def prefill(
    model: Decoder,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    rope: Rope,
    settings: LayerSettings,
    *,
    tile_size: int,
    capture: bool = False,
    ends: Bool[Array, " B"] | None = None,
) -> StackCarry:
    """Appends `count` tokens of every row to the cache and runs them.

    Args:
      model: The decoder.
      cache: May already hold `start` tokens of every row. Its capacity must be at least
        `start + padded_length(T, tile_size)` for every row.
      tokens: Right-padded token ids.
      start: Tokens that each row holds already (0 for a new prompt).
      count: Valid tokens of each row, 0 … T.
      rope: Rotary frequencies of the request.
      settings: The model and how to attend.
      tile_size: Query tokens per tile; the result does not depend on it.
      capture: Also return the block lists (for tests and evaluation: T×P memory).
      ends: Rows whose prompt ends with this call; None for all that have tokens.

    Returns:
      The carry after the last layer: hidden states [B, T, D] (garbage behind each row's
      end), the cache with the prompt in it and, with `capture`, the block lists
      [L, B, K, T, P].
    """
    # A verified forecast gives what the own queries choose: ask them alone.
    settings = dataclasses.replace(settings, selector=settings.chooser)
    width = tokens.shape[1]
    if not settings.sparse.mask_future_blocks:
        # The literal reference scores windows that reach past their query, so a tile
        # would have to see keys of the next one (docs/algorithm.md §7.2).
        tile_size = width
    tile_size = min(tile_size, width)
    padded = padded_length(width, tile_size)
    tokens = jnp.pad(tokens, ((0, 0), (0, padded - width)))
    needed = -(-jnp.max(count) // tile_size)
    ends = count > 0 if ends is None else ends

    rope_cos_sin = rope_cos_sin_at(rope, start[:, None] + jnp.arange(padded))

    def tile_state(first: int | Array, size: int) -> TileState:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

        return TileState(
            start=start + first,
            count=jnp.clip(count - first, 0, size),
            length=start + count,
            rope_cos_sin=RopeCosSin(cut(rope_cos_sin.cos), cut(rope_cos_sin.sin)),
            num_blocks=cache.num_blocks,
            decoding=False,
        )

    def run_tiles(
        activations: LayerActivations,
        view: ResidentView,
        last: Int[Array, "B K P"] | None,
        layer: DecoderLayer,
        layer_index: int | Array,
    ) -> tuple[LayerActivations, LayerCache, Int[Array, "B K P"] | None]:
        """A layer over all tiles; `last` becomes the lists of the rows' last tokens."""
        place = view.layer_in_stack

        def on_tile(tile: Array, loop: tuple) -> tuple:
            activations, layer_cache, last = loop
            first = tile * tile_size
            activations, view, _ = run_tile(
                layer_block(model, layer, layer_index, settings),
                activations,
                ResidentView(layer_cache, place),
                Lookahead(),
                layer_index,
                first,
                tile_size,
                tile_state(first, tile_size),
                settings,
            )
            if last is not None:
                assert view.blocks is not None
                last = _last_lists(last, view.blocks, count - 1 - first)
            return activations, view.layer_cache, last

        loop = (activations, view.layer_cache, last)
        activations, layer_cache, last = jax.lax.fori_loop(0, needed, on_tile, loop)
        layer_cache = end_prefill(
            layer_cache,
            place,
            start=start,
            length=start + count,
            ends=ends,
            sparse=settings.sparse,
            indices=settings.indices,
        )
        return activations, layer_cache, last

    def resident(
        carry: StackCarry, layer: DecoderLayer, layer_index: int | Array
    ) -> StackCarry:
        assert isinstance(carry.cache, KVCache)
        view = ResidentView(*carry.cache.layer(layer_index))
        activations, layer_cache, _ = run_tiles(
            carry.activations, view, None, layer, layer_index
        )
        cache = carry.cache.replace_layer(layer_index, layer_cache)
        return carry._replace(activations=activations, cache=cache)

    route = None if settings.offload is None else settings.offload.route

    def offloaded(
        loop: tuple[StackCarry, Array], layer: DecoderLayer, layer_index: int | Array
    ) -> tuple[StackCarry, Array]:
        carry, scratch = loop
        cache = carry.cache
        assert isinstance(cache, OffloadCache)
        if cache.first is not None and is_first(layer_index):
            view = ResidentView(*cache.layer0())
            activations, layer_cache, _ = run_tiles(
                carry.activations, view, None, layer, layer_index
            )
            cache = cache.replace_layer0(layer_cache)
            return carry._replace(activations=activations, cache=cache), scratch
        index = layer_index - cache.resident_layers
        view, last = ResidentView(load_layer(cache, index, scratch, start), 0), None
        selector, blocks = settings.selector, cache.num_blocks
        if selector.lists_blocks(blocks, settings.sparse, decoding=False):
            width = settings.selector.list_width(cache.num_blocks, settings.sparse)
            shape = (cache.batch, cache.store.lead[2], width)
            last = jnp.full(shape, -1, jnp.int32)
        activations, layer_cache, last = run_tiles(
            carry.activations, view, last, layer, layer_index
        )
        cache = write_back_layer(cache, index, layer_cache, last, start, count, route)
        # The next layer overwrites the scratch: only behind what reads it here.
        cache, scratch = jax.lax.optimization_barrier((cache, layer_cache.kv))
        return carry._replace(activations=activations, cache=cache), scratch

    def evicting(
        loop: tuple[StackCarry, Scratch], layer: DecoderLayer, layer_index: int | Array
    ) -> tuple[StackCarry, Scratch]:
        carry, scratch = loop
        assert isinstance(carry.cache, KVCache)
        view = ResidentView(whole_layer(carry.cache, layer_index, scratch), 0)
        activations, layer_cache, _ = run_tiles(
            carry.activations, view, None, layer, layer_index
        )
        length = start + count
        at_end = TileState(
            start=jnp.maximum(length - 1, 0),
            count=jnp.minimum(length, 1),
            length=length,
            rope_cos_sin=rope_cos_sin,
            num_blocks=cache.num_blocks,
            decoding=True,
            layer=layer_index,
        )
        kept = keep_listed(
            carry.cache, layer_index, layer_cache, length, at_end, settings
        )
        scratch = Scratch(layer_cache.kv, layer_cache.key_bias)
        # The next layer overwrites the scratch: only behind what reads it here.
        kept, scratch = jax.lax.optimization_barrier((kept, scratch))
        return carry._replace(activations=activations, cache=kept), scratch

    whole = tile_state(0, padded)
    carry = start_stack(model, cache, tokens, whole, settings, capture=capture)
    if isinstance(cache, OffloadCache):
        loop = (carry, scratch_kv(cache))
        carry, _ = run_layers(
            model, offloaded, loop, unscanned_layers=cache.resident_layers
        )
    elif cache.layers[0].page_table is not None:
        carry, _ = run_layers(model, evicting, (carry, new_scratch(cache)))
    else:
        carry = run_layers(model, resident, carry)
    blocks = None if carry.blocks is None else carry.blocks[:, :, :, :width]
    activations = carry.activations._replace(
        hidden=carry.hidden[:, :width], blocks=blocks
    )
    return carry._replace(activations=activations)


def _last_lists(
    last: Int[Array, "B K P"],
    lists: Int[Array, "B K T P"],
    token: Int[Array, " B"],
) -> Int[Array, "B K P"]:
    """`last`, with the list of `token` where that token is in the tile."""
    size = lists.shape[2]
    at = jnp.clip(token, 0, size - 1)[:, None, None, None]
    here = jnp.take_along_axis(lists, at, axis=2)[:, :, 0]
    inside = ((token >= 0) & (token < size))[:, None, None]
    return jnp.where(inside, here, last)


def padded_length(width: int, tile_size: int) -> int:
    """`width` rounded up to whole tiles: the room that prefill writes to."""
    return -(-width // tile_size) * tile_size
