"""The `host_loop` route: decode as a Python loop of one jitted call a layer.

What anyone would write first, and the baseline of the pipeline that runs inside one
program: NumPy gathers the listed blocks out of host memory, `jax.device_put` sends them
while the layer before still computes, and every layer is a call of its own. It runs the
same layer body and gives the same tokens.

Where a layer selects for itself it takes two calls: its choice must be known on the
host before its blocks can be sent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from sparda_jax.cache.codecs import BlockCodec, Parts
from sparda_jax.cache.counters import FetchCounters
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadCache, OffloadLayer
from sparda_jax.cache.offload_view import OffloadView, Stack
from sparda_jax.cache.prefetch import BlockFetch, Lookahead, NextLayer
from sparda_jax.cache.resident_view import ResidentView
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.cache.slots import slot_of, table_at
from sparda_jax.inference.generate import (
    GenerateState,
    Request,
    after_step,
    must_pause,
)
from sparda_jax.inference.layer import (
    CacheView,
    LayerBlock,
    LayerMiddle,
    layer_after_fetch,
    layer_before_fetch,
)
from sparda_jax.inference.stack import (
    LayerActivations,
    StackCarry,
    after_layer,
    layer_block,
    start_stack,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, own_logits
from sparda_jax.models.rope import rope_cos_sin_at

_static = functools.partial(jax.jit, static_argnames="settings")


@_static
def _start(
    model: Decoder,
    state: GenerateState,
    request: Request,
    cache: OffloadCache,
    settings: LayerSettings,
) -> tuple[LayerActivations, TileState]:
    tile = TileState(
        start=state.lengths,
        count=(~state.done).astype(jnp.int32),
        length=state.lengths + 1,
        rope_cos_sin=rope_cos_sin_at(request.rope, state.lengths[:, None]),
        num_blocks=cache.num_blocks,
        decoding=True,
    )
    tokens = state.pending[:, None]
    carry = start_stack(model, cache, tokens, tile, settings, capture=False)
    return carry.activations, tile


@_static
def _choose(
    block: LayerBlock,
    activations: LayerActivations,
    view: CacheView,
    lookahead: Lookahead,
    tile: TileState,
    settings: LayerSettings,
) -> LayerMiddle:
    """A layer up to its choice of blocks."""
    hidden, forecast = activations.hidden, activations.forecast
    return layer_before_fetch(block, hidden, forecast, view, lookahead, tile, settings)


@_static
def _attend(
    block: LayerBlock,
    middle: LayerMiddle,
    activations: LayerActivations,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[LayerActivations, CacheView, BlockFetch | None]:
    """The rest of the layer, its blocks staged; with the next layer's fetch."""
    out = layer_after_fetch(block, middle, tile, settings)
    activations = after_layer(activations, out, 0, 0, 1, tile, settings)
    return activations, out.view, out.lookahead.fetch


@_static
def _whole(
    block: LayerBlock,
    activations: LayerActivations,
    view: CacheView,
    lookahead: Lookahead,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[LayerActivations, CacheView, BlockFetch | None]:
    """A layer whose blocks are staged already (or that has a slot for every block)."""
    middle = _choose(block, activations, view, lookahead, tile, settings)
    return _attend(block, middle, activations, tile, settings)


@_static
def _finish(
    model: Decoder,
    state: GenerateState,
    activations: LayerActivations,
    fetches: FetchCounters,
    request: Request,
    settings: LayerSettings,
) -> GenerateState:
    carry = StackCarry(activations, state.cache, (), fetches)
    scores = own_logits(model, activations.hidden[:, 0])
    return after_step(state, carry, scores, request, settings)


@functools.partial(jax.jit, static_argnames="codec")
def _tails(
    layer: OffloadLayer,
    full: Bool[Array, " B"],
    block: Int[Array, " B"],
    codec: BlockCodec,
) -> tuple[Parts, OffloadLayer]:
    """Every row's block of that id, as it is stored.

    With the layer, in whose slots the full ones now are as they are stored.
    """
    _, batch, heads, slots = layer.slots.shape[:4]
    slot = jnp.maximum(slot_of(table_at(layer.table, 0), block[:, None]), 0)
    rows, kv_heads = jnp.ogrid[:batch, :heads]
    tails = layer.slots[0, rows, kv_heads, slot]
    if layer.tail is not None:
        tails = layer.tail[0]
    if not codec.exact:
        where = (0, rows, kv_heads, jnp.where(full[:, None], slot, slots))
        pairs = zip(layer.held, codec.for_slots(tails), strict=True)
        layer = layer.holding(
            tuple(held.at[where].set(new, mode="drop") for held, new in pairs)
        )
    return codec.encode(tails), layer


def _unstack(layers: tuple[OffloadLayer, ...]) -> list[OffloadLayer]:
    """One `OffloadLayer` a layer, however they are stored."""
    first = layers[0].slots.shape[0]
    if first == 1:
        return list(layers)
    return [jax.tree.map(lambda x, i=i: x[i : i + 1], layers[0]) for i in range(first)]


def _restack(
    layers: list[OffloadLayer], like: tuple[OffloadLayer, ...]
) -> tuple[OffloadLayer, ...]:
    if len(like) == len(layers):
        return tuple(layers)
    return (jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers),)


def _layer_weights(model: Decoder) -> list[DecoderLayer]:
    if isinstance(model.layers, nnx.List):
        return list(model.layers)
    count = model.config.num_layers
    return [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(count)]


def _staged(fetch: BlockFetch, store: tuple[np.ndarray, ...]) -> BlockFetch:
    """The fetch with its missing blocks on their way to the device."""
    if fetch.lacks_nothing:
        return fetch
    sources = np.asarray(fetch.plan.sources)
    missing = sources >= 0
    staged = []
    for part in store:
        flat = part.reshape(-1, *part.shape[4:])
        blocks = np.empty((len(sources), *flat.shape[1:]), flat.dtype)
        blocks[missing] = flat[sources[missing]]
        staged.append(jax.device_put(blocks))
    return fetch._replace(staged=tuple(staged))


def decode_host_loop(
    model: Decoder, state: GenerateState, request: Request, *, settings: LayerSettings
) -> GenerateState:
    """Decodes as `generate.advance` does, for the `host_loop` route.

    Args:
      model: The decoder.
      state: Where generation stands; its cache is offloaded.
      request: Sampling and limits.
      settings: The model and how to attend.
    """
    cache, offload = state.cache, settings.offload
    assert isinstance(cache, OffloadCache) and offload is not None
    host = cache.store.to_numpy()
    layers, first = _unstack(cache.layers), cache.first
    blocks = [
        layer_block(model, layer, index, settings)
        for index, layer in enumerate(_layer_weights(model))
    ]
    lists = settings.selector.lists_blocks(cache.num_blocks, settings.sparse)
    block_size = settings.sparse.block_size

    def lookahead(index: int) -> Lookahead:
        """What the layer before offloaded layer `index` does for it."""
        if not (offload.lookahead and lists) or index == len(layers):
            return Lookahead()
        return Lookahead(NextLayer(layers[index], 0, jnp.int32(index), True))

    for _ in range(int(request.steps)):
        done = np.asarray(state.done)
        if done.all():
            break
        activations, tile = _start(model, state, request, cache, settings)
        counts, fetch = [], None
        if first is not None:
            activations, view, fetch = _whole(
                blocks[0],
                activations,
                ResidentView(first, 0),
                lookahead(0),
                tile,
                settings,
            )
            assert isinstance(view, ResidentView)
            first = view.layer_cache
            counts.append(FetchCounters.zero())
        for index, block in enumerate(blocks[cache.resident_layers :]):
            if fetch is not None:
                fetch = _staged(fetch, host)
            place, zero = jnp.int32(index), FetchCounters.zero()
            view = OffloadView(layers[index], 0, place, fetch, zero, Stack(False))
            ahead = lookahead(index + 1)
            if fetch is None and lists:
                middle = _choose(block, activations, view, ahead, tile, settings)
                view = middle.view
                assert isinstance(view, OffloadView) and view.fetch is not None
                view = view._replace(fetch=_staged(view.fetch, host))
                middle = middle._replace(view=view)
                result = _attend(block, middle, activations, tile, settings)
            else:
                result = _whole(block, activations, view, ahead, tile, settings)
            activations, view, fetch = result
            assert isinstance(view, OffloadView)
            layers[index] = view.layer_cache
            counts.append(view.fetches)
        lengths = np.asarray(state.lengths)
        full = ~done & (lengths % block_size == block_size - 1)
        if full.any():
            _save_tails(cache.store, host, layers, full, lengths // block_size)
        fetches = jax.tree.map(lambda *parts: jnp.stack(parts), *counts)
        state = _finish(model, state, activations, fetches, request, settings)
        if must_pause(state, request):
            break

    cache = cache._replace(
        store=cache.store.with_numpy(host),
        layers=_restack(layers, cache.layers),
        first=first,
    )
    return state._replace(cache=cache)


def _save_tails(
    store: HostStore,
    host: tuple[np.ndarray, ...],
    layers: list[OffloadLayer],
    full: Bool[np.ndarray, " B"],
    block: Int[np.ndarray, " B"],
) -> None:
    """Writes the tail blocks that have filled up to the host store."""
    rows, blocks = jnp.asarray(full), jnp.asarray(block, jnp.int32)
    for index, layer in enumerate(layers):
        tails, layers[index] = _tails(layer, rows, blocks, store.codec)
        for part, tail in zip(host, map(np.asarray, tails), strict=True):
            for row in np.flatnonzero(full):
                part[index, row, :, block[row]] = tail[row]
