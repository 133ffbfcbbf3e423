"""How the layer body reaches its KV cache: resident, or slots over host memory.

The body (`layer_step.decoder_layer`) is written once against these methods, in the
order in which it calls them:

  look_ahead   score the next layer's compressed keys with the forecast for it
  append       extend the compressed keys by the tile's tokens
  plan         choose the blocks of this layer, if nobody looked ahead for it
  fence        what comes behind it waits for this layer's blocks, if they were sent for
               by the layer before; it keeps the next fetch beside the layer's compute
  fetch        start the copies that look_ahead or plan found missing
  land         put what was fetched for this layer, and the new token, into slots
  attend       attention over the chosen blocks

A resident layer has nothing to fetch for itself; it may look ahead for an offloaded
one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.plan_slots.api import plan_slots
from sparda_jax.cache.offload import OffloadLayer
from sparda_jax.cache.resident import LayerCache, append_tokens
from sparda_jax.cache.routes import FetchRoute
from sparda_jax.cache.slots import SlotTable, slot_of
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.inference.counters import FetchCounters
from sparda_jax.models.rope import Rotation
from sparda_jax.sparse.compression import append_windows
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors import Selector


@dataclasses.dataclass(frozen=True)
class OffloadSettings:
    """How an offloaded cache is decoded, resolved from a `CacheConfig`.

    Attributes:
      route: How blocks are fetched.
      lookahead: Layer l's forecast starts the fetch for layer l + 1.
      verify: The layer's own queries have the last word.
      recall_every: Steps between comparisons of forecast and own queries; 0 never.
    """

    route: FetchRoute
    lookahead: bool
    verify: bool = False
    recall_every: int = 0

    @property
    def on_side_stream(self) -> bool:
        """Whether a look-ahead fetch gets a stream of its own."""
        return self.lookahead and self.route.overlaps


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What is fixed at trace time, the same for every layer and step.

    Attributes:
      config: The model.
      sparse: Selection geometry.
      selector: How blocks are chosen.
      implementation: Kernels of attention and of prefill's block scores: None takes
        what is recorded as fastest for the device, a name is never replaced.
      offload: How an offloaded cache is decoded; None for a resident one.
    """

    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    implementation: Implementation | None = None
    offload: OffloadSettings | None = None

    @property
    def own_query(self) -> Selector:
        """The selector with the layer's own queries in place of the forecast."""
        return self.selector.by_own_query()

    @property
    def chooser(self) -> Selector:
        """Who has the last word: the own queries when a forecast is verified."""
        verify = self.offload is not None and self.offload.verify
        return self.own_query if verify else self.selector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileState:
    """Where a tile stands in its rows.

    Attributes:
      start: Position of the tile's first token, per row [B].
      count: Valid tokens of the tile, per row [B]; the rest is padding.
      length: Keys of the row once the whole prompt or step is in [B].
      turn: Rotation of the tile's tokens.
      decoding: The tile is one decode step.
    """

    start: Int[Array, " B"]
    count: Int[Array, " B"]
    length: Int[Array, " B"]
    turn: Rotation
    decoding: bool = dataclasses.field(metadata={"static": True})

    def positions(self, steps: int) -> Int[Array, "B T"]:
        """Positions of the tile's tokens."""
        return self.start[:, None] + jnp.arange(steps)


class TokenKV(NamedTuple):
    """Keys after RoPE and values of the tile's tokens, with NOSA's c or None."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None


def _tile_of(
    q: Float[Array, "B T N H"] | None,
    phi: Float[Array, "B T K H"] | None,
    windows: Float[Array, "B K W H"],
    importance: Float[Array, "B K W"] | None,
    tile: TileState,
    steps: int,
) -> SelectionTile:
    return SelectionTile(
        q=q,
        phi=phi,
        positions=tile.positions(steps),
        windows=windows,
        importance=importance,
        length=tile.length,
        decoding=tile.decoding,
    )


def _attended_bias(
    key_bias: Float[Array, "*shape"] | None, tile: TileState, settings: LayerSettings
) -> Float[Array, "*shape"] | None:
    """The key bias that attention sees: [layers, B, K, blocks, block], or None."""
    sparse = settings.sparse
    if key_bias is None or sparse.dense_key_bias:
        return key_bias
    # Parity with the reference, which drops c wherever attention is dense (§8.6).
    if settings.selector.scores is None:
        return None
    if sparse.dense_len > 0:
        dense = tile.length < sparse.dense_len
        key_bias = jnp.where(dense[None, :, None, None, None], 0.0, key_bias)
    return key_bias


def _slot_lengths(
    blocks: Int[Array, "B K P"], tile: TileState, block_size: int
) -> Int[Array, "B K P"]:
    """Valid tokens of each listed block: only a row's last one can be partly filled."""
    filled = tile.length[:, None, None] - blocks * block_size
    return jnp.clip(filled, 0, block_size)


class Flight(NamedTuple):
    """A block list on its way to a layer's slots.

    Attributes:
      blocks: The list [B, K, P].
      slots: Where each of them lies or will [B, K, P]; −1 for padding.
      rows: Host rows to fetch, in turn from every row and head; −1 where one of them
        misses fewer than others [B*K*P].
      places: The slot that each of them goes to, counted through all layers that are
        stored with this one, or −1 [B*K*P].
      bound: Entries of `rows` behind which all are −1.
      fetched: How many blocks are fetched.
      hits: Listed blocks that were in a slot already.
      staged: The fetched blocks [B*K*P, block, 2, H], or None before the fetch.
    """

    blocks: Int[Array, "B K P"]
    slots: Int[Array, "B K P"]
    rows: Int[Array, " J"]
    places: Int[Array, " J"]
    bound: Int[Array, ""]
    fetched: Int[Array, ""]
    hits: Int[Array, ""]
    staged: Float[Array, "J block 2 H"] | None


class Ahead(NamedTuple):
    """What a layer must know of the next one to look ahead for it.

    Attributes:
      windows: Its compressed keys, as of the step before [B, K, W, H].
      importance: NOSA's window means of c [B, K, W], or None.
      table: Its slots [B, K, C].
      place: Where in its `OffloadLayer`.
      index: Its place in the host store.
      exists: False behind the last layer: nothing is listed or fetched.
    """

    windows: Float[Array, "B K W H"]
    importance: Float[Array, "B K W"] | None
    table: SlotTable
    place: int | Int[Array, ""]
    index: int | Int[Array, ""]
    exists: bool | Bool[Array, ""]


class Outlook(NamedTuple):
    """A layer's view of the next one.

    Attributes:
      ahead: What is known of the next layer; its table once looked at.
      flight: The next layer's list, once looked at.
    """

    ahead: Ahead
    flight: Flight | None = None

    def look(
        self, phi: Float[Array, "B 1 K H"], tile: TileState, settings: LayerSettings
    ) -> "Outlook":
        """Chooses the next layer's blocks and finds out which of them are missing.

        The next layer's compressed keys lack the window that this step may finish.
        That window lies in forced local blocks, so the choice is the same (§4.4).
        """
        ahead = self.ahead
        seen = _tile_of(None, phi, ahead.windows, ahead.importance, tile, 1)
        blocks = settings.selector.select(seen, settings.config, settings.sparse)
        assert blocks is not None
        capacity = ahead.windows.shape[2] // settings.sparse.windows_per_block
        listed = (tile.count > 0) & ahead.exists
        flight, table = _depart(
            ahead.table,
            ahead.place,
            ahead.index,
            capacity,
            blocks[:, :, 0],
            listed,
            tile,
            settings,
        )
        return Outlook(ahead._replace(table=table), flight)


class Link(NamedTuple):
    """What a fetch needs beside its list.

    Attributes:
      store: The host blocks; None where they are fetched outside of the program.
      spare: Staging areas that are free, where the route reuses them.
    """

    store: Float[Array, "Lo B K M block 2 H"] | None
    spare: tuple[Float[Array, "J block 2 H"], ...] = ()

    def start(
        self, flight: Flight, offload: OffloadSettings, *, aside: bool
    ) -> tuple[Flight, "Link"]:
        """The flight with its fetch under way, and the link left."""
        assert self.store is not None
        into, spare = None, self.spare
        if spare:
            *rest, into = spare
            spare = tuple(rest)
        flat = self.store.reshape(-1, *self.store.shape[4:])
        staged = offload.route.fetch(
            flat, flight.rows, flight.bound, into, on_side_stream=aside
        )
        return flight._replace(staged=staged), self._replace(spare=spare)

    def give_back(self, staged: Array, offload: OffloadSettings) -> "Link":
        """The link with a staging area that is free again."""
        if not offload.route.reuses_staging:
            return self
        return self._replace(spare=(*self.spare, staged))


class ResidentStore(NamedTuple):
    """A layer of a resident cache.

    Attributes:
      cache: The `LayerCache` that holds it.
      index: Where in it.
      blocks: The tile's block lists once planned; None for all causal blocks.
      outlook: The next layer, if it is offloaded and looked ahead for.
      link: The way to the host, likewise.
    """

    cache: LayerCache
    index: int | Int[Array, ""]
    blocks: Int[Array, "B K T P"] | None = None
    outlook: Outlook | None = None
    link: Link | None = None

    def look_ahead(
        self, phi: Array | None, tile: TileState, settings: LayerSettings
    ) -> "ResidentStore":
        """Looks ahead for the next layer."""
        return _look_ahead(self, phi, tile, settings)

    def append(
        self, new: TokenKV, tile: TileState, settings: LayerSettings
    ) -> "ResidentStore":
        """Puts the tokens into the cache."""
        cache = append_tokens(
            self.cache,
            self.index,
            new.k,
            new.v,
            new.key_bias,
            start=tile.start,
            count=tile.count,
            sparse=settings.sparse,
        )
        return self._replace(cache=cache)

    def plan(
        self, q: Array, phi: Array | None, tile: TileState, settings: LayerSettings
    ) -> "ResidentStore":
        """Chooses the tile's blocks."""
        importance = self.cache.importance
        seen = _tile_of(
            q,
            phi,
            self.cache.keys.windows[self.index],
            None if importance is None else importance.windows[self.index][..., 0],
            tile,
            q.shape[1],
        )
        blocks = settings.chooser.select(
            seen, settings.config, settings.sparse, settings.implementation
        )
        return self._replace(blocks=blocks)

    def fetch(self, settings: LayerSettings) -> "ResidentStore":
        """Starts the next layer's fetch; this layer's blocks are all here."""
        return _start_outlook(self, settings)

    def fence(self, x: Array, settings: LayerSettings) -> tuple["ResidentStore", Array]:
        """Orders the next layer's fetch."""
        return _fence(self, x, settings)

    def land(
        self, q: Array, tile: TileState, settings: LayerSettings
    ) -> "ResidentStore":
        """Nothing."""
        del q, tile, settings
        return self

    def attend(
        self,
        q: Float[Array, "B T N H"],
        tile: TileState,
        settings: LayerSettings,
    ) -> Float[Array, "B T N H"]:
        """Attention of the tile over its block lists."""
        key_bias = _attended_bias(self.cache.key_bias, tile, settings)
        if not tile.decoding:
            return block_sparse_attention(
                q,
                self.cache.kv,
                q_start=tile.start,
                block_indices=self.blocks,
                layer=self.index,
                key_bias=key_bias,
                implementation=settings.implementation,
            )
        # In a resident cache slot c holds block c.
        slots = None if self.blocks is None else self.blocks[:, :, 0]
        return _decode_attention(
            q, self.cache.kv, slots, slots, key_bias, self.index, tile, settings
        )


def _decode_attention(
    q: Float[Array, "B 1 N H"],
    kv: Float[Array, "layers B K C block 2 H"],
    slots: Int[Array, "B K P"] | None,
    blocks: Int[Array, "B K P"] | None,
    key_bias: Float[Array, "layers B K C block"] | None,
    index: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
) -> Float[Array, "B 1 N H"]:
    """One token's attention over slots; None: over all of them, in their order."""
    lengths = None
    if blocks is not None:
        lengths = _slot_lengths(blocks, tile, settings.sparse.block_size)
    out = paged_decode_attention(
        q[:, 0],
        kv,
        slots=slots,
        slot_lengths=lengths,
        lengths=tile.length if slots is None else None,
        layer=index,
        key_bias=key_bias,
        implementation=settings.implementation,
    )
    return out[:, None]


class OffloadStore(NamedTuple):
    """An offloaded layer at a decode step.

    Attributes:
      own: The `OffloadLayer` that holds it.
      place: Where in it.
      index: The layer's place in the host store.
      table: The layer's slots [B, K, C].
      flight: The layer's block list; None before `plan` if nobody looked ahead, and
        when all blocks are attended.
      link: The way to the host.
      outlook: The next layer, if it is looked ahead for.
      token: The step's keys and values until they are in a slot.
      wanted: What the layer's own queries choose, to verify the flight by, or None.
      fetches: What the layer's list cost.
    """

    own: OffloadLayer
    place: int | Int[Array, ""]
    index: int | Int[Array, ""]
    table: SlotTable
    flight: Flight | None
    link: Link
    fetches: FetchCounters
    outlook: Outlook | None = None
    token: TokenKV | None = None
    wanted: Int[Array, "B K P"] | None = None

    def look_ahead(
        self,
        phi: Float[Array, "B 1 K H"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> "OffloadStore":
        """Looks ahead for the next layer."""
        result = _look_ahead(self, phi, tile, settings)
        if result.outlook is None or self.own.slots.shape[0] == 1:
            return result
        # Both layers lie in one stack: what is read of it comes before what is written,
        # or XLA would keep a copy of the stack.
        own, outlook = lax.optimization_barrier((result.own, result.outlook))
        return result._replace(own=own, outlook=outlook)

    def append(
        self, new: TokenKV, tile: TileState, settings: LayerSettings
    ) -> "OffloadStore":
        """Extends the compressed keys; the token itself waits for its slot."""
        own, sparse = self.own, settings.sparse
        start, count = tile.start, tile.count
        keys = append_windows(
            own.keys, self.place, new.k, start=start, count=count, sparse=sparse
        )
        own = own._replace(keys=keys)
        if new.key_bias is not None:
            assert own.key_bias is not None and own.importance is not None
            rows = jnp.arange(new.k.shape[0])[:, None]
            kv_heads = jnp.arange(new.k.shape[2])[None]
            block, offset = divmod(start[:, None], sparse.block_size)
            where = (self.place, rows, kv_heads, block, offset)
            bias = own.key_bias.at[where].set(new.key_bias[:, 0], mode="drop")
            importance = append_windows(
                own.importance,
                self.place,
                new.key_bias[..., None],
                start=start,
                count=count,
                sparse=sparse,
            )
            own = own._replace(key_bias=bias, importance=importance)
        return self._replace(own=own, token=new)

    def _select(
        self,
        selector: Selector,
        q: Float[Array, "B 1 N H"],
        phi: Float[Array, "B 1 K H"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> Int[Array, "B K P"] | None:
        importance = self.own.importance
        seen = _tile_of(
            q,
            phi,
            self.own.keys.windows[self.place],
            None if importance is None else importance.windows[self.place][..., 0],
            tile,
            1,
        )
        blocks = selector.select(seen, settings.config, settings.sparse)
        return None if blocks is None else blocks[:, :, 0]

    def plan(
        self,
        q: Float[Array, "B 1 N H"],
        phi: Float[Array, "B 1 K H"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> "OffloadStore":
        """Chooses this layer's blocks, unless the layer before did."""
        if self.flight is not None:
            if settings.offload is None or not settings.offload.verify:
                return self
            wanted = self._select(settings.own_query, q, None, tile, settings)
            return self._replace(wanted=wanted)
        blocks = self._select(settings.chooser, q, phi, tile, settings)
        if blocks is None:
            return self
        return self._list(blocks, tile, settings)

    def _list(
        self, blocks: Int[Array, "B K P"], tile: TileState, settings: LayerSettings
    ) -> "OffloadStore":
        """Takes a list for the layer."""
        capacity = self.own.keys.windows.shape[3] // settings.sparse.windows_per_block
        flight, table = _depart(
            self.table,
            self.place,
            self.index,
            capacity,
            blocks,
            tile.count > 0,
            tile,
            settings,
        )
        return self._replace(flight=flight, table=table)

    def fetch(self, settings: LayerSettings) -> "OffloadStore":
        """Starts the copies: the next layer's beside compute, or this layer's own."""
        result = _start_outlook(self, settings)
        if result.flight is None or result.flight.staged is not None:
            return result
        return result._fetch_own(settings)

    def _fetch_own(self, settings: LayerSettings) -> "OffloadStore":
        assert settings.offload is not None and self.flight is not None
        flight, link = self.link.start(self.flight, settings.offload, aside=False)
        return self._replace(flight=flight, link=link)

    def fence(self, x: Array, settings: LayerSettings) -> tuple["OffloadStore", Array]:
        """Orders the next layer's fetch."""
        return _fence(self, x, settings)

    def land(
        self,
        q: Float[Array, "B 1 N H"],
        tile: TileState,
        settings: LayerSettings,
    ) -> "OffloadStore":
        """Puts what was fetched, and the step's token, into slots."""
        offload = settings.offload
        assert offload is not None and self.token is not None
        result = self
        if self.flight is not None:
            result = result._arrive(offload)
            if result.wanted is not None:
                result = result._verify(result.wanted, tile, settings)
            elif offload.recall_every:
                result = result._count_recall(q, tile, settings)
        return result._write_token(tile, settings)

    def _arrive(self, offload: OffloadSettings) -> "OffloadStore":
        """The flight's blocks in their slots; its staging area is free again."""
        flight, slots = self.flight, self.own.slots
        assert flight is not None and flight.staged is not None
        flat = slots.reshape(-1, *slots.shape[4:])
        flat = commit_blocks(flat, flight.staged, flight.places, count=flight.bound)
        fetches = self.fetches._replace(
            hits=self.fetches.hits + flight.hits,
            fetched=self.fetches.fetched + flight.fetched,
        )
        return self._replace(
            own=self.own._replace(slots=flat.reshape(slots.shape)),
            flight=flight._replace(staged=None),
            link=self.link.give_back(flight.staged, offload),
            fetches=fetches,
        )

    def _verify(
        self, wanted: Int[Array, "B K P"], tile: TileState, settings: LayerSettings
    ) -> "OffloadStore":
        """Replaces the forecast list by the own queries' and fetches what lacks."""
        forecast, offload = self.flight, settings.offload
        assert forecast is not None and offload is not None
        before = self.fetches
        result = self._list(wanted, tile, settings)._fetch_own(settings)
        result = result._arrive(offload)
        assert result.flight is not None
        recall_hits, recall_total = _overlap(
            forecast.blocks, result.flight.blocks, tile, settings
        )
        repaired = result.fetches.fetched - before.fetched
        # Hits and misses of the list count once, as the forecast found them.
        fetches = result.fetches._replace(
            hits=before.hits,
            repaired=before.repaired + repaired,
            recall_hits=before.recall_hits + recall_hits,
            recall_total=before.recall_total + recall_total,
        )
        return result._replace(fetches=fetches, wanted=None)

    def _count_recall(
        self,
        q: Float[Array, "B 1 N H"],
        tile: TileState,
        settings: LayerSettings,
    ) -> "OffloadStore":
        """Compares the forecast with the own queries' choice in sampled steps."""
        flight, offload = self.flight, settings.offload
        assert flight is not None and offload is not None
        step = jnp.max(jnp.where(tile.count > 0, tile.length, 0))

        def compare() -> tuple[Array, Array]:
            chosen = self._select(settings.own_query, q, None, tile, settings)
            assert chosen is not None
            chosen = jnp.where((tile.count > 0)[:, None, None], chosen, -1)
            return _overlap(flight.blocks, chosen, tile, settings)

        zero = jnp.int32(0)
        hits, total = lax.cond(
            step % offload.recall_every == 0, compare, lambda: (zero, zero)
        )
        fetches = self.fetches._replace(
            recall_hits=self.fetches.recall_hits + hits,
            recall_total=self.fetches.recall_total + total,
        )
        return self._replace(fetches=fetches)

    def _write_token(self, tile: TileState, settings: LayerSettings) -> "OffloadStore":
        token, slots = self.token, self.own.slots
        assert token is not None
        batch, heads, count = slots.shape[1:4]
        block, offset = divmod(tile.start[:, None], settings.sparse.block_size)
        block = jnp.broadcast_to(block, (batch, heads))
        table = self.table
        if self.flight is None:
            # Every block has its own slot; the table keeps up for a cache that grows.
            slot = jnp.where((tile.count > 0)[:, None], block, count)
            rows, kv_heads = jnp.ogrid[:batch, :heads]
            where = (rows, kv_heads, slot)
            table = SlotTable(
                table.blocks.at[where].set(block, mode="drop"),
                table.used.at[where].set(
                    jnp.broadcast_to(tile.length[:, None], slot.shape), mode="drop"
                ),
            )
        else:
            slot = slot_of(table.blocks, block)
            live = (slot >= 0) & (tile.count > 0)[:, None]
            slot = jnp.where(live, slot, count)
        rows, kv_heads = jnp.ogrid[:batch, :heads]
        kv = jnp.stack((token.k[:, 0], token.v[:, 0]), axis=2).astype(slots.dtype)
        where = (self.place, rows, kv_heads, slot, offset)
        slots = slots.at[where].set(kv, mode="drop", unique_indices=True)
        return self._replace(own=self.own._replace(slots=slots), table=table)

    def attend(
        self,
        q: Float[Array, "B 1 N H"],
        tile: TileState,
        settings: LayerSettings,
    ) -> Float[Array, "B 1 N H"]:
        """Attention over the slots of the layer's list."""
        kv, place = self.own.slots, self.place
        key_bias = self.own.key_bias
        if key_bias is not None:
            # c is kept by block; attention wants it by slot.
            held = jnp.maximum(self.table.blocks, 0)[..., None]
            key_bias = jnp.take_along_axis(key_bias[place], held, axis=2)[None]
            kv, place = kv[place][None], 0
        key_bias = _attended_bias(key_bias, tile, settings)
        flight = self.flight
        return _decode_attention(
            q,
            kv,
            None if flight is None else flight.slots,
            None if flight is None else flight.blocks,
            key_bias,
            place,
            tile,
            settings,
        )

    @property
    def blocks(self) -> Int[Array, "B K 1 P"] | None:
        """The layer's block list; None for all causal blocks."""
        return None if self.flight is None else self.flight.blocks[:, :, None]


LayerStore = ResidentStore | OffloadStore


def _look_ahead[S: (ResidentStore, OffloadStore)](
    store: S, phi: Array | None, tile: TileState, settings: LayerSettings
) -> S:
    if store.outlook is None:
        return store
    assert phi is not None
    return store._replace(outlook=store.outlook.look(phi, tile, settings))


def _start_outlook[S: (ResidentStore, OffloadStore)](
    store: S, settings: LayerSettings
) -> S:
    """Starts the fetch for the next layer."""
    offload = settings.offload
    if store.outlook is None or store.outlook.flight is None or offload is None:
        return store
    assert store.link is not None
    flight, link = store.link.start(
        store.outlook.flight, offload, aside=offload.on_side_stream
    )
    return store._replace(outlook=store.outlook._replace(flight=flight), link=link)


def _fence[S: (ResidentStore, OffloadStore)](
    store: S, x: Array, settings: LayerSettings
) -> tuple[S, Array]:
    """Orders fetches beside compute.

    What uses `x` afterwards comes behind what made it, behind the arrival of this
    layer's blocks, and behind the start of the next layer's fetch.
    """
    offload, outlook = settings.offload, store.outlook
    if offload is None or not offload.on_side_stream:
        return store, x
    leaving = None if outlook is None else outlook.flight
    arriving = store.flight if isinstance(store, OffloadStore) else None
    moving = (
        None if arriving is None else arriving.staged,
        None if leaving is None else (leaving.rows, leaving.bound),
    )
    if moving[0] is None and moving[1] is None:
        return store, x
    x, (staged, listed) = lax.optimization_barrier((x, moving))
    if leaving is not None:
        rows, bound = listed
        flight = leaving._replace(rows=rows, bound=bound)
        assert outlook is not None
        store = store._replace(outlook=outlook._replace(flight=flight))
    if arriving is not None and isinstance(store, OffloadStore):
        store = store._replace(flight=arriving._replace(staged=staged))
    return store, x


def _depart(
    table: SlotTable,
    place: int | Int[Array, ""],
    index: int | Int[Array, ""],
    capacity: int,
    blocks: Int[Array, "B K P"],
    listed: Bool[Array, " B"],
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Flight, SlotTable]:
    """A list's flight, not fetched yet, and the table that goes with it.

    Args:
      table: The layer's slots.
      place: Where the layer lies in its `OffloadLayer`.
      index: The layer's place in the host store.
      capacity: M.
      blocks: What to attend to.
      listed: Rows that take part; the others ask for nothing.
      tile: The step.
      settings: Block size.
    """
    batch, heads, _ = blocks.shape
    blocks = jnp.where(listed[:, None, None], blocks, -1)

    def by_head(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (batch, heads))

    plan = plan_slots(
        table.blocks,
        table.used,
        blocks,
        stamp=by_head(tile.length),
        own=by_head(tile.start // settings.sparse.block_size),
        source=index * (batch * heads * capacity),
        target=place * table.blocks.size,
        row_blocks=capacity,
    )
    flight = Flight(
        blocks=blocks,
        slots=plan.slots,
        rows=plan.sources,
        places=plan.targets,
        bound=plan.bound,
        fetched=plan.fetched,
        hits=plan.hits,
        staged=None,
    )
    return flight, SlotTable(plan.blocks, plan.used)


def _overlap(
    forecast: Int[Array, "B K P"],
    chosen: Int[Array, "B K P"],
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Scored blocks of `chosen` that `forecast` lists too, and all of them."""
    sparse = settings.sparse
    own = (tile.start // sparse.block_size)[:, None, None]
    by_score = (chosen >= sparse.init_blocks) & (chosen < own - sparse.local_blocks)
    shared = jnp.any(chosen[..., None] == forecast[..., None, :], axis=-1)
    return (
        jnp.sum(by_score & shared, dtype=jnp.int32),
        jnp.sum(by_score, dtype=jnp.int32),
    )
