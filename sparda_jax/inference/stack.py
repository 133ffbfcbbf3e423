"""Tiles through the layers: what prefill and decode share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sparda_jax.cache.counters import BlockCounts, FetchCounters, WideCount
from sparda_jax.cache.offload import OffloadCache, write_back_full_blocks
from sparda_jax.cache.offload_view import OffloadView, Stack
from sparda_jax.cache.prefetch import BlockFetch, Lookahead, NextLayer, StagingPool
from sparda_jax.cache.resident import KVCache
from sparda_jax.cache.resident_view import ResidentView
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.inference.layer import (
    CacheView,
    LayerBlock,
    LayerOutput,
    decoder_layer,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.models.layers import rms_norm
from sparda_jax.sparse.selection import budget_width

Cache = KVCache | OffloadCache


class LayerActivations(NamedTuple):
    """What travels through the layers with the tokens.

    Attributes:
      hidden: Hidden states [B, T, D].
      forecast: What a layer before made for this one's choice: forecasts
        [B, T, K, H] as a rule, or block scores; None for nothing.
      later: The same for the layers behind this one, as far as it is made already: of
        none, where every layer makes the next one's.
      attended: KV blocks read so far; stays 0 while all causal blocks are read.
      blocks: Captured block lists [L, B, K, T, P], or None.
    """

    hidden: Float[Array, "B T D"]
    forecast: Float[Array, "B T heads F"] | None
    attended: WideCount
    blocks: Int[Array, "L B K T P"] | None
    later: tuple[Float[Array, "B T heads F"], ...] = ()


class StackCarry(NamedTuple):
    """Everything that travels through the layers.

    Attributes:
      activations: Hidden states, forecasts and counters.
      cache: The KV cache.
      fetches_ahead: The blocks of the next layer, and of more behind it where lists are
        made so far ahead, on their way (look-ahead decode).
      fetches: Counters of the offloaded cache by layer [L], or None.
    """

    activations: LayerActivations
    cache: Cache
    fetches_ahead: tuple[BlockFetch, ...] = ()
    fetches: FetchCounters | None = None

    @property
    def hidden(self) -> Float[Array, "B T D"]:
        """Hidden states."""
        return self.activations.hidden

    @property
    def blocks(self) -> Int[Array, "L B K T P"] | None:
        """Captured block lists."""
        return self.activations.blocks


def start_stack(
    model: Decoder,
    cache: Cache,
    tokens: Int[Array, "B T"],
    tile: TileState,
    settings: LayerSettings,
    *,
    capture: bool,
) -> StackCarry:
    """Embeds the tokens and makes layer 0's own forecast (docs/algorithm.md §4.2)."""
    config = settings.config
    h = embed(model, tokens, model.embedding[...].dtype)
    blocks = None
    forecast = _first_forecast(model, h, cache.num_blocks, tile, settings)
    if capture:
        width = _captured_width(cache.num_blocks, tile, settings)
        shape = (config.num_layers, tokens.shape[0], config.num_kv_heads)
        blocks = jnp.full((*shape, tokens.shape[1], width), -1, jnp.int32)
    fetches = None
    if settings.offload is not None and tile.decoding:
        fetches = FetchCounters.zero(config.num_layers)
    activations = LayerActivations(h, forecast, WideCount.zero(), blocks)
    carry = StackCarry(activations, cache, (), fetches)
    return _choose_for_first_layers(model, carry, tile, settings)


def _choose_for_first_layers(
    model: Decoder, carry: StackCarry, tile: TileState, settings: LayerSettings
) -> StackCarry:
    """What no layer makes where lists are made several layers ahead.

    Layer 0 makes that of layer d; those of layers 1 … d − 1 are made here, of layer 0's
    input. Heads that read behind attention get it in the norm of what they read, as if
    the attention added nothing: it is not known yet.
    """
    config, selector, cache = settings.config, settings.selector, carry.cache
    most = min(settings.layers_ahead(decoding=tile.decoding), config.num_layers)
    if most == 1 or not selector.lists_blocks(cache.num_blocks, settings.sparse):
        return carry
    assert isinstance(cache, OffloadCache) and settings.offload is not None
    late = selector.asks_late(config)
    norm = model.first_mlp_norm() if late else model.first_attention_norm()
    x = rms_norm(carry.hidden, norm, config.rms_norm_eps)
    later: list[Array] = []
    fetches: list[BlockFetch] = []
    pool = StagingPool(cache.staging)
    for number in range(1, most):
        weights, forecast = selector.next_query_weights(model, number), None
        if weights is not None:
            forecast = selector.next_query(weights, x, tile.rope_cos_sin)
            later.append(forecast)
        if settings.offload.lookahead:
            index = number - cache.resident_layers
            in_store = cache.place_in_store(index)
            layer = NextLayer(*cache.place(index), in_store, True, number)
            ahead = Lookahead(layer, store=cache.store, pool=pool)
            ahead = ahead.plan_next(forecast, tile.in_layer(0), settings)
            if cache.stacked:
                # As in `OffloadView.behind`.
                layers, fetch = lax.optimization_barrier((cache.layers, ahead.fetch))
                cache = cache._replace(layers=layers)
                ahead = ahead._replace(fetch=fetch)
            ahead = ahead.start(settings)
            assert ahead.fetch is not None
            fetches.append(ahead.fetch)
            pool = ahead.pool
    return StackCarry(
        carry.activations._replace(later=tuple(later)),
        cache._replace(staging=pool.areas),
        tuple(fetches),
        carry.fetches,
    )


def _first_forecast(
    model: Decoder,
    h: Float[Array, "B T D"],
    num_blocks: int,
    tile: TileState,
    settings: LayerSettings,
) -> Float[Array, "B T heads F"] | None:
    """What layer 0 chooses by: its own forecast, or None."""
    config, selector = settings.config, settings.selector
    if selector.dense_prefill and not tile.decoding:
        return None
    if selector.hands_on_scores:
        if not selector.lists_blocks(num_blocks, settings.sparse):
            return None
        # Nobody hands layer 0 any: it takes its own.
        shape = (*h.shape[:2], config.num_kv_heads, num_blocks)
        return jnp.zeros(shape, jnp.float32)
    weights = selector.next_query_weights(model, 0)
    if weights is None:
        return None
    x = rms_norm(h, model.first_attention_norm(), config.rms_norm_eps)
    return selector.next_query(weights, x, tile.rope_cos_sin)


def _captured_width(num_blocks: int, tile: TileState, settings: LayerSettings) -> int:
    """Blocks of a captured list."""
    if settings.selector.dense:
        return budget_width(settings.sparse, num_blocks)
    if settings.selector.dense_prefill and not tile.decoding:
        return num_blocks
    return settings.selector.list_width(num_blocks, settings.sparse)


def _causal_lists(
    tile: TileState, shape: tuple[int, ...], block_size: int
) -> Int[Array, "B K T P"]:
    """The lists that `None` stands for: every block up to the row's own."""
    own = (tile.positions(shape[2]) // block_size)[:, None, :, None]
    block = jnp.arange(shape[-1])
    return jnp.broadcast_to(jnp.where(block <= own, block, -1), shape)


def run_tile(
    block: LayerBlock,
    activations: LayerActivations,
    view: CacheView,
    lookahead: Lookahead,
    layer_index: int | Int[Array, ""],
    first: int | Int[Array, ""],
    size: int,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[LayerActivations, CacheView, Lookahead]:
    """Runs one layer on the tokens first … first + size − 1.

    Args:
      block: The layer's weights.
      activations: What travels with the tokens, of the whole prompt or step.
      view: The layer's cache.
      lookahead: The next layer, if this one shall look ahead for it.
      layer_index: The layer's number.
      first: Where the tile begins.
      size: How many tokens it has.
      tile: Where it stands in its rows.
      settings: The model and how to attend.
    """

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

    out = decoder_layer(
        block,
        cut(activations.hidden),
        None if activations.forecast is None else cut(activations.forecast),
        view,
        lookahead,
        tile,
        settings,
    )
    activations = after_layer(
        activations, out, layer_index, first, size, tile, settings
    )
    return activations, out.view, out.lookahead


def after_layer(
    activations: LayerActivations,
    out: LayerOutput,
    layer_index: int | Int[Array, ""],
    first: int | Int[Array, ""],
    size: int,
    tile: TileState,
    settings: LayerSettings,
) -> LayerActivations:
    """The activations with a layer's output; arguments as those of `run_tile`."""

    def put(x: Array, piece: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, piece, first, axis=1)

    attended, blocks = activations.attended, activations.blocks
    lists = out.view.blocks
    if lists is not None:
        valid = jnp.arange(size) < tile.count[:, None]
        picked = jnp.sum((lists >= 0) & valid[:, None, :, None], dtype=jnp.uint32)
        attended = attended.add(picked)
    if blocks is not None:
        if lists is None:
            shape = (*blocks.shape[1:3], size, blocks.shape[-1])
            lists = _causal_lists(tile, shape, settings.sparse.block_size)
        at = (layer_index, 0, 0, first, 0)
        blocks = jax.lax.dynamic_update_slice(blocks, lists[None], at)
    forecast, later = activations.forecast, activations.later
    if forecast is not None:
        forecast = None if out.forecast is None else put(forecast, out.forecast)
    if later and forecast is not None:
        forecast, *later = (*later, forecast)
    return LayerActivations(
        hidden=put(activations.hidden, out.hidden),
        forecast=forecast,
        attended=attended,
        blocks=blocks,
        later=tuple(later),
    )


def layer_block(
    model: Decoder,
    layer: DecoderLayer,
    layer_index: int | Int[Array, ""],
    settings: LayerSettings,
    ahead: int = 1,
) -> LayerBlock:
    """A layer's weights, with those of the query that it makes for a later one.

    Args:
      model: The decoder.
      layer: The layer.
      layer_index: Its number.
      settings: How to attend.
      ahead: How many layers behind it that one is.
    """
    weights = settings.selector.next_query_weights(model, layer_index + ahead)
    return LayerBlock(layer, weights, layer_index)


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
    """`run_tile` on a carry: takes the layer's view of the cache and puts it back.

    An offloaded cache is viewed in decode steps only; prefill has its own way.
    """
    view, lookahead = _view(carry, layer_index, settings)
    ahead = settings.layers_ahead(decoding=tile.decoding)
    activations, view, lookahead = run_tile(
        layer_block(model, layer, layer_index, settings, ahead),
        carry.activations,
        view,
        lookahead,
        layer_index,
        first,
        size,
        tile,
        settings,
    )
    started = () if lookahead.fetch is None else (lookahead.fetch,)
    # Nobody chose for layer 0: what is under way is of the layers behind it.
    rest = carry.fetches_ahead[0 if is_first(layer_index) else 1 :]
    carry = carry._replace(activations=activations, fetches_ahead=(*rest, *started))
    return _put_back(carry, view, lookahead.pool, layer_index)


def _view(
    carry: StackCarry, layer_index: int | Int[Array, ""], settings: LayerSettings
) -> tuple[CacheView, Lookahead]:
    """A layer's view of the cache, and what it looks ahead for."""
    cache = carry.cache
    if isinstance(cache, KVCache):
        return ResidentView(*cache.layer(layer_index)), Lookahead()
    lookahead = Lookahead(
        next_layer=_next_layer(cache, layer_index, settings),
        store=cache.store,
        pool=StagingPool(cache.staging),
    )
    if cache.first is not None and is_first(layer_index):
        return ResidentView(*cache.layer0()), lookahead
    index = layer_index - cache.resident_layers
    layer_cache, place = cache.place(index)
    fetch = None
    if carry.fetches_ahead and not is_first(layer_index):
        fetch = carry.fetches_ahead[0]
    view = OffloadView(
        layer_cache,
        place,
        cache.place_in_store(index),
        fetch,
        FetchCounters.zero(),
        Stack(cache.stacked),
    )
    return view, lookahead


def _put_back(
    carry: StackCarry,
    view: CacheView,
    pool: StagingPool,
    layer_index: int | Int[Array, ""],
) -> StackCarry:
    """The carry with a layer's cache and counters in it."""
    cache, fetches = carry.cache, carry.fetches
    if isinstance(cache, KVCache):
        assert isinstance(view, ResidentView)
        cache = cache.replace_layer(layer_index, view.layer_cache)
        return carry._replace(cache=cache)
    cache = cache._replace(staging=pool.areas)
    if isinstance(view, ResidentView):
        return carry._replace(cache=cache.replace_layer0(view.layer_cache))
    index = layer_index - cache.resident_layers
    assert fetches is not None
    pairs = zip(fetches, view.fetches, strict=True)
    counters = FetchCounters(*(all_.at[layer_index].set(one) for all_, one in pairs))
    cache = cache.replace_layer(index, view.layer_cache)
    return carry._replace(cache=cache, fetches=counters)


def is_first(layer_index: int | Int[Array, ""]) -> bool:
    """Whether a layer is known to be layer 0 while the program is traced."""
    return isinstance(layer_index, int) and layer_index == 0


def _next_layer(
    cache: OffloadCache, layer_index: int | Int[Array, ""], settings: LayerSettings
) -> NextLayer | None:
    """The next layer, or a later one, if this one shall look ahead for it."""
    offload = settings.offload
    lists = settings.selector.lists_blocks(cache.num_blocks, settings.sparse)
    if offload is None or not offload.lookahead or not lists:
        return None
    last = settings.config.num_layers - 1
    ahead = offload.layers_ahead
    if isinstance(layer_index, int):
        if layer_index + ahead > last:
            return None
        index, exists = layer_index + ahead - cache.resident_layers, True
    else:
        # In a scan the last layers look at the last one and list nothing.
        exists = layer_index + ahead <= last
        index = jnp.minimum(layer_index + ahead, last) - cache.resident_layers
    layer_cache, place = cache.place(index)
    in_store = cache.place_in_store(index)
    return NextLayer(layer_cache, place, in_store, exists, ahead)


def end_stack(
    carry: StackCarry,
    start: Int[Array, " B"],
    active: Int[Array, " B"],
    settings: LayerSettings,
) -> StackCarry:
    """Ends an offloaded decode step: tail blocks that are full now go to the host."""
    cache, offload = carry.cache, settings.offload
    assert isinstance(cache, OffloadCache) and offload is not None
    for fetch in carry.fetches_ahead:
        # The scanned form ends with fetches of layers that do not exist.
        if fetch.staged is not None:
            pool = StagingPool(cache.staging).release(fetch.staged, offload)
            cache = cache._replace(staging=pool.areas)
    block, offset = divmod(start, settings.sparse.block_size)
    full = (active > 0) & (offset == settings.sparse.block_size - 1)
    # Behind the last layer's attention: XLA would keep a copy of its slots else, where
    # full blocks are rounded in theirs.
    activations = carry.activations
    hidden, full = lax.optimization_barrier((activations.hidden, full))
    cache = write_back_full_blocks(cache, full, block)
    activations = activations._replace(hidden=hidden)
    return carry._replace(activations=activations, cache=cache, fetches_ahead=())


def block_counts(
    carry: StackCarry,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    width: int,
    settings: LayerSettings,
    *,
    decoding: bool,
) -> BlockCounts:
    """Blocks read and present for `count` tokens from `start` on in every row."""
    config = settings.config
    token = jnp.arange(width)
    blocks = (start[:, None] + token) // settings.sparse.block_size + 1
    blocks = jnp.where(token < count[:, None], blocks, 0)
    present = WideCount.total(blocks * (config.num_kv_heads * config.num_layers))
    lists = settings.selector.lists_blocks(
        carry.cache.num_blocks, settings.sparse, decoding=decoding
    )
    return BlockCounts(carry.activations.attended if lists else present, present)
