"""Tiles through the layers: what prefill and decode share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.offload import OffloadCache, OffloadLayer, flush_tails
from sparda_jax.cache.resident import KVCache
from sparda_jax.cache.slots import SlotTable
from sparda_jax.inference.counters import BlockCounts, FetchCounters, WideCount
from sparda_jax.inference.layer_step import (
    LayerOutput,
    decoder_layer,
    forecast_for_first_layer,
)
from sparda_jax.inference.layer_store import (
    Ahead,
    Flight,
    LayerSettings,
    Link,
    OffloadStore,
    Outlook,
    ResidentStore,
    TileState,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.sparse.selection import budget_width

Cache = KVCache | OffloadCache


class Tokens(NamedTuple):
    """What travels through the layers with the tokens.

    Attributes:
      hidden: Hidden states [B, T, D].
      phi: Forecasts of the layer before [B, T, K, H], or None.
      attended: KV blocks read so far; stays 0 while all causal blocks are read.
      blocks: Captured block lists [L, B, K, T, P], or None.
    """

    hidden: Float[Array, "B T D"]
    phi: Float[Array, "B T K H"] | None
    attended: WideCount
    blocks: Int[Array, "L B K T P"] | None


class StackCarry(NamedTuple):
    """Everything that travels through the layers.

    Attributes:
      tokens: Hidden states, forecasts and counters.
      cache: The KV cache.
      flight: The next layer's block list, on its way (look-ahead decode), or None.
      fetches: Counters of the offloaded cache by layer [L], or None.
    """

    tokens: Tokens
    cache: Cache
    flight: Flight | None = None
    fetches: FetchCounters | None = None

    @property
    def hidden(self) -> Float[Array, "B T D"]:
        """Hidden states."""
        return self.tokens.hidden

    @property
    def blocks(self) -> Int[Array, "L B K T P"] | None:
        """Captured block lists."""
        return self.tokens.blocks


def start_stack(
    model: Decoder,
    cache: Cache,
    tokens: Int[Array, "B T"],
    tile: TileState,
    settings: LayerSettings,
    *,
    capture: bool,
) -> StackCarry:
    """Embeds the tokens and makes layer 0's own forecast."""
    config = settings.config
    h = embed(model, tokens, model.embedding[...].dtype)
    phi = blocks = None
    if settings.selector.needs_forecast:
        norm, head = model.first_attention_norm(), model.forecast_head(0)
        phi = forecast_for_first_layer(h, norm, head, tile.turn, config)
    if capture:
        width = budget_width(settings.sparse, cache.num_blocks)
        shape = (config.num_layers, tokens.shape[0], config.num_kv_heads)
        blocks = jnp.full((*shape, tokens.shape[1], width), -1, jnp.int32)
    fetches = None
    if settings.offload is not None and tile.decoding:
        fetches = FetchCounters.zero(config.num_layers)
    return StackCarry(Tokens(h, phi, WideCount.zero(), blocks), cache, None, fetches)


def _causal_lists(
    tile: TileState, shape: tuple[int, ...], block_size: int
) -> Int[Array, "B K T P"]:
    """The lists that `None` stands for: every block up to the row's own."""
    own = (tile.positions(shape[2]) // block_size)[:, None, :, None]
    block = jnp.arange(shape[-1])
    return jnp.broadcast_to(jnp.where(block <= own, block, -1), shape)


def run_tile[Store: (ResidentStore, OffloadStore)](
    next_head: Float[Array, "D KH"] | None,
    tokens: Tokens,
    store: Store,
    layer: DecoderLayer,
    layer_index: int | Int[Array, ""],
    first: int | Int[Array, ""],
    size: int,
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Tokens, Store]:
    """Runs one layer on the tokens first … first + size − 1.

    Args:
      next_head: Forecast head that the next layer consumes, or None.
      tokens: What travels with the tokens, of the whole prompt or step.
      store: The layer's cache.
      layer: The layer's weights.
      layer_index: Its number.
      first: Where the tile begins.
      size: How many tokens it has.
      tile: Where it stands in its rows.
      settings: The model and how to attend.
    """

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

    out = decoder_layer(
        layer,
        next_head,
        cut(tokens.hidden),
        None if tokens.phi is None else cut(tokens.phi),
        store,
        tile,
        settings,
    )
    assert isinstance(out.store, type(store))
    tokens = after_layer(tokens, out, layer_index, first, size, tile, settings)
    return tokens, out.store


def after_layer(
    tokens: Tokens,
    out: LayerOutput,
    layer_index: int | Int[Array, ""],
    first: int | Int[Array, ""],
    size: int,
    tile: TileState,
    settings: LayerSettings,
) -> Tokens:
    """The tokens with a layer's output in them; arguments as those of `run_tile`."""

    def put(x: Array, piece: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, piece, first, axis=1)

    attended, lists, blocks = tokens.attended, out.store.blocks, tokens.blocks
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
    return Tokens(
        hidden=put(tokens.hidden, out.hidden),
        phi=(
            None if tokens.phi is None or out.phi is None else put(tokens.phi, out.phi)
        ),
        attended=attended,
        blocks=blocks,
    )


def next_head(
    model: Decoder, layer_index: int | Int[Array, ""], settings: LayerSettings
) -> Float[Array, "D KH"] | None:
    """The Forecast head that a layer computes for the next one, or None."""
    if not settings.selector.needs_forecast:
        return None
    return model.forecast_head(layer_index + 1)


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
    """`run_tile` on a carry: opens the layer's cache before and closes it after.

    An offloaded cache is opened for decode steps only; prefill has its own way.
    """
    cache, tokens = carry.cache, carry.tokens
    head = next_head(model, layer_index, settings)

    def run[Store: (ResidentStore, OffloadStore)](store: Store) -> tuple[Tokens, Store]:
        return run_tile(
            head, tokens, store, layer, layer_index, first, size, tile, settings
        )

    if isinstance(cache, KVCache):
        tokens, resident = run(ResidentStore(*cache.layer(layer_index)))
        cache = cache.replace_layer(layer_index, resident.cache)
        return carry._replace(tokens=tokens, cache=cache)
    assert tile.decoding
    outlook = next_outlook(cache, layer_index, settings)
    link = Link(cache.store, cache.spare)
    if cache.first is not None and is_first(layer_index):
        store = ResidentStore(cache.first, 0, outlook=outlook, link=link)
        tokens, store = run(store)
        cache = cache._replace(first=store.cache)
        return _close(carry, tokens, cache, store, layer_index)
    index = layer_index - cache.resident_layers
    own, place = cache.place(index)
    tokens, opened = run(
        OffloadStore(
            own=own,
            place=place,
            index=index,
            table=table_at(own, place),
            flight=carry.flight,
            link=link,
            fetches=FetchCounters.zero(),
            outlook=outlook,
        )
    )
    own = opened.own._replace(table=put_table(opened.own, opened.table, place))
    cache = cache.replace_layer(index, own)
    assert carry.fetches is not None
    fetches = FetchCounters(
        *(
            total.at[layer_index].set(one)
            for total, one in zip(carry.fetches, opened.fetches, strict=True)
        )
    )
    carry = carry._replace(fetches=fetches)
    return _close(carry, tokens, cache, opened, layer_index)


def is_first(layer_index: int | Int[Array, ""]) -> bool:
    """Whether a layer is known to be layer 0 while the program is traced."""
    return isinstance(layer_index, int) and layer_index == 0


def table_at(layer: OffloadLayer, place: int | Int[Array, ""]) -> SlotTable:
    """One layer's slots."""
    return SlotTable(layer.table.blocks[place], layer.table.used[place])


def put_table(
    layer: OffloadLayer, table: SlotTable, place: int | Int[Array, ""]
) -> SlotTable:
    """The tables of `layer` with one layer's replaced."""
    return SlotTable(
        layer.table.blocks.at[place].set(table.blocks),
        layer.table.used.at[place].set(table.used),
    )


def next_outlook(
    cache: OffloadCache, layer_index: int | Int[Array, ""], settings: LayerSettings
) -> Outlook | None:
    """The next layer, if this one shall look ahead for it."""
    offload = settings.offload
    lists = settings.selector.lists_blocks(cache.num_blocks, settings.sparse)
    if offload is None or not offload.lookahead or not lists:
        return None
    last = settings.config.num_layers - 1
    if isinstance(layer_index, int):
        if layer_index == last:
            return None
        index, exists = layer_index + 1 - cache.resident_layers, True
    else:
        # In a scan the last layer looks at itself and lists nothing.
        exists = layer_index < last
        index = jnp.minimum(layer_index + 1, last) - cache.resident_layers
    layer, place = cache.place(index)
    return outlook_on(layer, place, index, exists)


def outlook_on(
    layer: OffloadLayer,
    place: int | Int[Array, ""],
    index: int | Int[Array, ""],
    exists: bool | Bool[Array, ""],
) -> Outlook:
    """A view of an offloaded layer, from the one before it."""
    importance = layer.importance
    ahead = Ahead(
        windows=layer.keys.windows[place],
        importance=None if importance is None else importance.windows[place][..., 0],
        table=table_at(layer, place),
        place=place,
        index=index,
        exists=exists,
    )
    return Outlook(ahead)


def _close(
    carry: StackCarry,
    tokens: Tokens,
    cache: OffloadCache,
    store: ResidentStore | OffloadStore,
    layer_index: int | Int[Array, ""],
) -> StackCarry:
    """Puts back what looking ahead changed: the next layer's table and its flight."""
    assert store.link is not None
    cache = cache._replace(spare=store.link.spare)
    outlook = store.outlook
    if outlook is None:
        return carry._replace(tokens=tokens, cache=cache, flight=None)
    index, table = layer_index + 1 - cache.resident_layers, outlook.ahead.table
    if not isinstance(layer_index, int):
        index = outlook.ahead.index
    layer, place = cache.place(index)
    if not isinstance(layer_index, int):
        # Behind the last layer the outlook is the layer itself, as it was before.
        table = jax.tree.map(
            lambda new, old: jnp.where(outlook.ahead.exists, new, old),
            table,
            table_at(layer, place),
        )
    layer = layer._replace(table=put_table(layer, table, place))
    cache = cache.replace_layer(index, layer)
    return carry._replace(tokens=tokens, cache=cache, flight=outlook.flight)


def end_stack(
    carry: StackCarry,
    start: Int[Array, " B"],
    active: Int[Array, " B"],
    settings: LayerSettings,
) -> StackCarry:
    """Ends an offloaded decode step: tail blocks that are full now go to the host."""
    cache, offload = carry.cache, settings.offload
    assert isinstance(cache, OffloadCache) and offload is not None
    if carry.flight is not None:
        # The scanned form ends with the flight of a layer that does not exist.
        assert carry.flight.staged is not None
        link = Link(None, cache.spare).give_back(carry.flight.staged, offload)
        cache = cache._replace(spare=link.spare)
    block, offset = divmod(start, settings.sparse.block_size)
    full = (active > 0) & (offset == settings.sparse.block_size - 1)
    return carry._replace(cache=flush_tails(cache, full, block), flight=None)


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
    present = WideCount.total(blocks * (config.num_kv_heads * config.num_layers))
    lists = settings.selector.lists_blocks(carry.cache.num_blocks, settings.sparse)
    return BlockCounts(carry.tokens.attended if lists else present, present)
