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
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.memory import host_sharding
from sparda_jax.cache.offload import OffloadCache, OffloadLayer
from sparda_jax.cache.resident import LayerCache
from sparda_jax.cache.slots import slot_of
from sparda_jax.inference.counters import FetchCounters
from sparda_jax.inference.generate import (
    GenerateState,
    Request,
    after_step,
    must_pause,
)
from sparda_jax.inference.layer_step import (
    LayerMiddle,
    layer_after_fetch,
    layer_before_fetch,
)
from sparda_jax.inference.layer_store import (
    Flight,
    LayerSettings,
    Link,
    OffloadStore,
    ResidentStore,
    TileState,
)
from sparda_jax.inference.stack import (
    StackCarry,
    Tokens,
    after_layer,
    next_head,
    outlook_on,
    put_table,
    start_stack,
    table_at,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, logits
from sparda_jax.models.rope import rotation

_static = functools.partial(jax.jit, static_argnames="settings")


@_static
def _start(
    model: Decoder,
    state: GenerateState,
    request: Request,
    cache: OffloadCache,
    settings: LayerSettings,
) -> tuple[Tokens, TileState]:
    tile = TileState(
        start=state.lengths,
        count=(~state.done).astype(jnp.int32),
        length=state.lengths + 1,
        turn=rotation(request.rope, state.lengths[:, None]),
        decoding=True,
    )
    tokens = state.pending[:, None]
    carry = start_stack(model, cache, tokens, tile, settings, capture=False)
    return carry.tokens, tile


def _outlook(ahead: OffloadLayer | None, index: Int[Array, ""]):
    return None if ahead is None else outlook_on(ahead, 0, index, True)


@_static
def _first_layer(
    layer: DecoderLayer,
    head: Float[Array, "D KH"] | None,
    tokens: Tokens,
    cache: LayerCache,
    ahead: OffloadLayer | None,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Tokens, LayerCache, OffloadLayer | None, Flight | None]:
    """A resident layer 0, looking ahead."""
    store = ResidentStore(cache, 0, outlook=_outlook(ahead, jnp.int32(0)))
    middle = layer_before_fetch(
        layer, head, tokens.hidden, tokens.phi, store, tile, settings
    )
    out = layer_after_fetch(layer, middle, tile, settings)
    assert isinstance(out.store, ResidentStore)
    tokens = after_layer(tokens, out, 0, 0, 1, tile, settings)
    ahead, flight = _looked(out.store, ahead)
    return tokens, out.store.cache, ahead, flight


def _looked(
    store: ResidentStore | OffloadStore, ahead: OffloadLayer | None
) -> tuple[OffloadLayer | None, Flight | None]:
    """The next layer with its slots planned, and the flight to it."""
    if store.outlook is None or ahead is None:
        return ahead, None
    table = put_table(ahead, store.outlook.ahead.table, 0)
    return ahead._replace(table=table), store.outlook.flight


@_static
def _choose(
    layer: DecoderLayer,
    head: Float[Array, "D KH"] | None,
    tokens: Tokens,
    own: OffloadLayer,
    ahead: OffloadLayer | None,
    index: Int[Array, ""],
    flight: Flight | None,
    tile: TileState,
    settings: LayerSettings,
) -> LayerMiddle:
    """A layer up to its choice of blocks."""
    store = OffloadStore(
        own=own,
        place=0,
        index=index,
        table=table_at(own, 0),
        flight=flight,
        link=Link(None),
        fetches=FetchCounters.zero(),
        outlook=_outlook(ahead, index + 1),
    )
    return layer_before_fetch(
        layer, head, tokens.hidden, tokens.phi, store, tile, settings
    )


@_static
def _attend(
    layer: DecoderLayer,
    middle: LayerMiddle,
    tokens: Tokens,
    ahead: OffloadLayer | None,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Tokens, OffloadLayer, OffloadLayer | None, Flight | None, FetchCounters]:
    """The rest of the layer, its blocks staged."""
    out = layer_after_fetch(layer, middle, tile, settings)
    store = out.store
    assert isinstance(store, OffloadStore)
    tokens = after_layer(tokens, out, 0, 0, 1, tile, settings)
    own = store.own._replace(table=put_table(store.own, store.table, 0))
    ahead, flight = _looked(store, ahead)
    return tokens, own, ahead, flight, store.fetches


@_static
def _whole(
    layer: DecoderLayer,
    head: Float[Array, "D KH"] | None,
    tokens: Tokens,
    own: OffloadLayer,
    ahead: OffloadLayer | None,
    index: Int[Array, ""],
    flight: Flight | None,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Tokens, OffloadLayer, OffloadLayer | None, Flight | None, FetchCounters]:
    """A layer whose blocks are staged already (or that has a slot for every block)."""
    middle = _choose(layer, head, tokens, own, ahead, index, flight, tile, settings)
    return _attend(layer, middle, tokens, ahead, tile, settings)


@_static
def _finish(
    model: Decoder,
    state: GenerateState,
    tokens: Tokens,
    fetches: FetchCounters,
    request: Request,
    settings: LayerSettings,
) -> GenerateState:
    carry = StackCarry(tokens, state.cache, None, fetches)
    scores = logits(model, tokens.hidden[:, 0])
    return after_step(state, carry, scores, request, settings)


@jax.jit
def _tails(layer: OffloadLayer, block: Int[Array, " B"]) -> Float[Array, "B K *kv"]:
    """Every row's block of that id, out of its slot."""
    _, batch, heads = layer.slots.shape[:3]
    wanted = jnp.broadcast_to(block[:, None], (batch, heads))
    slot = jnp.maximum(slot_of(layer.table.blocks[0], wanted), 0)
    rows, kv_heads = jnp.ogrid[:batch, :heads]
    return layer.slots[0, rows, kv_heads, slot]


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


def _staged(flight: Flight, store: np.ndarray) -> Flight:
    """The flight with its missing blocks on their way to the device."""
    rows = np.asarray(flight.rows)
    blocks = np.empty((len(rows), *store.shape[1:]), store.dtype)
    missing = rows >= 0
    blocks[missing] = store[rows[missing]]
    return flight._replace(staged=jax.device_put(blocks))


def advance_stepwise(
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
    host = np.array(cache.store)
    flat = host.reshape(-1, *host.shape[4:])
    layers, weights = _unstack(cache.layers), _layer_weights(model)
    heads = [next_head(model, index, settings) for index in range(len(weights))]
    first, resident = cache.first, cache.resident_layers
    lists = settings.selector.lists_blocks(cache.num_blocks, settings.sparse)
    looks = offload.lookahead and lists
    block_size = settings.sparse.block_size

    for _ in range(int(request.steps)):
        done = np.asarray(state.done)
        if done.all():
            break
        tokens, tile = _start(model, state, request, cache, settings)
        counts = [FetchCounters.zero()] * resident
        flight = None
        if first is not None:
            ahead = layers[0] if looks else None
            tokens, first, ahead, flight = _first_layer(
                weights[0], heads[0], tokens, first, ahead, tile, settings
            )
            if ahead is not None:
                layers[0] = ahead
        for index in range(len(layers)):
            number = index + resident
            layer, head = weights[number], heads[number]
            more = looks and index + 1 < len(layers)
            ahead = layers[index + 1] if more else None
            place = (layers[index], ahead, jnp.int32(index))
            if flight is not None:
                flight = _staged(flight, flat)
            if flight is None and lists:
                middle = _choose(layer, head, tokens, *place, None, tile, settings)
                assert isinstance(middle.store, OffloadStore)
                assert middle.store.flight is not None
                staged = _staged(middle.store.flight, flat)
                middle = middle._replace(store=middle.store._replace(flight=staged))
                result = _attend(layer, middle, tokens, ahead, tile, settings)
            else:
                result = _whole(layer, head, tokens, *place, flight, tile, settings)
            tokens, layers[index], ahead, flight, count = result
            if ahead is not None:
                layers[index + 1] = ahead
            counts.append(count)
        lengths = np.asarray(state.lengths)
        full = ~done & (lengths % block_size == block_size - 1)
        if full.any():
            _save_tails(host, layers, full, lengths // block_size)
        fetches = jax.tree.map(lambda *parts: jnp.stack(parts), *counts)
        state = _finish(model, state, tokens, fetches, request, settings)
        if must_pause(state, request):
            break

    cache = cache._replace(
        store=jax.device_put(host, host_sharding()),
        layers=_restack(layers, cache.layers),
        first=first,
    )
    return state._replace(cache=cache)


def _save_tails(
    host: np.ndarray,
    layers: list[OffloadLayer],
    full: Bool[np.ndarray, " B"],
    block: Int[np.ndarray, " B"],
) -> None:
    """Writes the tail blocks that have filled up to the host store."""
    for index, layer in enumerate(layers):
        tails = np.asarray(_tails(layer, jnp.asarray(block, jnp.int32)))
        for row in np.flatnonzero(full):
            host[index, row, :, block[row]] = tails[row]
