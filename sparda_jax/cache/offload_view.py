"""A layer's view of an offloaded cache in a decode step.

Its blocks are in host memory and in device slots. The list of a step was planned and
its fetch started by the layer before, or it is chosen here and its fetch is waited for;
either way `commit` puts the staged blocks, and then the step's token, into their slots.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sparda_jax.cache.attention import attended_bias, decode_attention, token_attention
from sparda_jax.cache.counters import FetchCounters
from sparda_jax.cache.offload import OffloadLayer
from sparda_jax.cache.prefetch import BlockFetch, Lookahead, order_fetch, plan_fetch
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.cache.slots import SlotTable, put_table, slot_of, table_at
from sparda_jax.sparse.index import NewTokens, TokenKV, append_to_index
from sparda_jax.sparse.selectors import Selector


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stack:
    """What holds a layer; known while a program is traced.

    Attributes:
      shared: It holds the layers behind this one too.
    """

    shared: bool


class OffloadView(NamedTuple):
    """An offloaded layer in a decode step.

    Attributes:
      layer_cache: The `OffloadLayer` that holds it.
      layer_in_stack: Where in it.
      layer_in_store: Where in the host store.
      fetch: The layer's block list; None before `select` if nobody looked ahead, and
        when all blocks are attended.
      fetches: What the layer's list cost.
      stack: Whether the layers behind it are in the same `OffloadLayer`.
      token: The step's keys and values until they are in a slot.
      own_blocks: What the layer's own queries choose, to verify the fetched list by.
    """

    layer_cache: OffloadLayer
    layer_in_stack: int | Int[Array, ""]
    layer_in_store: int | Int[Array, ""]
    fetch: BlockFetch | None
    fetches: FetchCounters
    stack: Stack
    token: TokenKV | None = None
    own_blocks: Int[Array, "B K P"] | None = None

    @property
    def table(self) -> SlotTable:
        """The layer's slots once its fetch is committed."""
        if self.fetch is not None:
            return self.fetch.table
        return table_at(self.layer_cache.table, self.layer_in_stack)

    @property
    def blocks(self) -> Int[Array, "B K 1 P"] | None:
        """The layer's block list; None for all causal blocks."""
        return None if self.fetch is None else self.fetch.blocks[:, :, None]

    def behind(self, lookahead: Lookahead) -> tuple["OffloadView", Lookahead]:
        """What changes the cache comes behind what looking ahead read of it.

        Where both layers are in one stack, XLA would keep a copy of it else.
        """
        if lookahead.fetch is None or not self.stack.shared:
            return self, lookahead
        cache, fetch = lax.optimization_barrier((self.layer_cache, lookahead.fetch))
        return self._replace(layer_cache=cache), lookahead._replace(fetch=fetch)

    def shown_to(self, lookahead: Lookahead) -> Lookahead:
        """What looks ahead behind this layer's changes of the cache reads them.

        Nothing of them is the later layer's. But where both are in one stack, XLA would
        keep the stack of before beside the changed one, a copy of it in every layer.
        """
        later = lookahead.next_layer
        if later is None or not self.stack.shared:
            return lookahead
        later = later._replace(layer_cache=self.layer_cache)
        return lookahead._replace(next_layer=later)

    def append(
        self, new: TokenKV, tile: TileState, settings: LayerSettings
    ) -> "OffloadView":
        """Extends the selector's index; the token itself waits for its slot."""
        cache, sparse = self.layer_cache, settings.sparse
        place, start = self.layer_in_stack, tile.start
        tokens = NewTokens(new, place, start, tile.count)
        index = append_to_index(settings.indices, cache.index, tokens, sparse)
        cache = cache._replace(index=index)
        if new.key_bias is not None:
            assert cache.key_bias is not None
            rows = jnp.arange(new.k.shape[0])[:, None]
            kv_heads = jnp.arange(new.k.shape[2])[None]
            block, offset = divmod(start[:, None], sparse.block_size)
            where = (place, rows, kv_heads, block, offset)
            bias = cache.key_bias.at[where].set(new.key_bias[:, 0], mode="drop")
            cache = cache._replace(key_bias=bias)
        return self._replace(layer_cache=cache, token=new)

    def select(
        self,
        q: Float[Array, "B 1 N H"],
        forecast: Float[Array, "B 1 heads F"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> "OffloadView":
        """Chooses this layer's blocks, unless the layer before did."""
        if self.fetch is not None:
            if settings.offload is None or not settings.offload.verify:
                return self
            own = self._choose(settings.own_query, q, None, tile, settings)
            return self._replace(own_blocks=own)
        blocks = self._choose(settings.chooser, q, forecast, tile, settings)
        return self if blocks is None else self._plan(blocks, tile, settings)

    def own_scores(
        self, q: Float[Array, "B 1 N H"], tile: TileState, settings: LayerSettings
    ) -> Float[Array, "B K 1 M"]:
        """Block scores of the layer's own queries, to be handed on."""
        seen = tile.selection(self.layer_cache.index, self.layer_in_stack, q=q)
        return settings.score_by_own_query(seen)

    def order(
        self, x: Float[Array, "*shape"], lookahead: Lookahead, settings: LayerSettings
    ) -> tuple[Float[Array, "*shape"], "OffloadView", Lookahead]:
        """Joins this layer's fetch, in order with the next one's (`order_fetch`)."""
        x, arriving, leaving = order_fetch(x, self.fetch, lookahead.fetch, settings)
        return x, self._replace(fetch=arriving), lookahead._replace(fetch=leaving)

    def commit(
        self,
        q: Float[Array, "B 1 N H"],
        lookahead: Lookahead,
        tile: TileState,
        settings: LayerSettings,
    ) -> tuple["OffloadView", Lookahead]:
        """Puts fetched blocks and the step's token into slots.

        A list that this layer chose for itself is fetched here first, and a verified
        one is replaced by the own queries' and completed.
        """
        view = self
        if view.fetch is not None:
            view, lookahead = view._commit_fetch(lookahead, settings)
            if view.own_blocks is not None:
                view, lookahead = view._verify(lookahead, tile, settings)
            elif settings.offload is not None and settings.offload.recall_every:
                view = view._count_recall(q, tile, settings)
        return view._write_token(tile, settings), lookahead

    def attend(
        self, q: Float[Array, "B 1 N H"], tile: TileState, settings: LayerSettings
    ) -> Float[Array, "B 1 N H"]:
        """Attention over the slots of the layer's list."""
        kv, place, fetch = self.layer_cache.slots, self.layer_in_stack, self.fetch
        key_bias = self.layer_cache.key_bias
        if settings.selector.attends_tokens:
            # It lists no blocks, so each has the slot of its own number.
            key_bias = attended_bias(key_bias, tile, settings)
            index = self.layer_cache.index
            return token_attention(q, kv, key_bias, index, place, tile, settings)
        if key_bias is not None:
            # c is kept by block; attention wants it by slot.
            held = jnp.maximum(self.table.blocks, 0)[..., None]
            key_bias = jnp.take_along_axis(key_bias[place], held, axis=2)[None]
            kv, place = kv[place][None], 0
        return decode_attention(
            q,
            kv,
            None if fetch is None else fetch.plan.slots,
            None if fetch is None else fetch.blocks,
            attended_bias(key_bias, tile, settings),
            place,
            tile,
            settings,
            scales=self.layer_cache.scales,
            tail=self.layer_cache.tail,
        )

    def _choose(
        self,
        selector: Selector,
        q: Float[Array, "B 1 N H"],
        forecast: Float[Array, "B 1 heads F"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> Int[Array, "B K P"] | None:
        cache = self.layer_cache
        seen = tile.selection(cache.index, self.layer_in_stack, q=q, forecast=forecast)
        blocks = selector.select(seen, settings.config, settings.sparse)
        return None if blocks is None else blocks[:, :, 0]

    def _plan(
        self, blocks: Int[Array, "B K P"], tile: TileState, settings: LayerSettings
    ) -> "OffloadView":
        """Takes a list for the layer."""
        fetch = plan_fetch(
            self.table,
            blocks,
            tile.count > 0,
            layer_in_stack=self.layer_in_stack,
            layer_in_store=self.layer_in_store,
            capacity=tile.num_blocks,
            tile=tile,
            settings=settings,
        )
        return self._replace(fetch=fetch)

    def _commit_fetch(
        self, lookahead: Lookahead, settings: LayerSettings
    ) -> tuple["OffloadView", Lookahead]:
        """The list's missing blocks in their slots; the staging buffer is free again.

        A fetch never writes to slots itself: the running layer may still read them, and
        XLA would then copy them all.
        """
        fetch, held = self.fetch, self.layer_cache.held
        assert fetch is not None and settings.offload is not None
        fetches = self.fetches._replace(
            hits=self.fetches.hits + fetch.plan.hits,
            fetched=self.fetches.fetched + fetch.plan.fetched,
        )
        if fetch.lacks_nothing:
            return self._replace(fetches=fetches), lookahead
        if fetch.staged is None:
            fetch, lookahead = lookahead.copy(fetch, settings, on_side_stream=False)
        assert fetch.staged is not None
        flat = tuple(x.reshape(-1, *x.shape[4:]) for x in held)
        plan = fetch.plan
        codec = settings.offload.codec
        flat = codec.commit(flat, fetch.staged, plan.targets, plan.bound)
        held = tuple(new.reshape(x.shape) for new, x in zip(flat, held, strict=True))
        pool = lookahead.pool.release(fetch.staged, settings.offload)
        view = self._replace(
            layer_cache=self.layer_cache.holding(held),
            fetch=fetch._replace(staged=None),
            fetches=fetches,
        )
        return view, lookahead._replace(pool=pool)

    def _verify(
        self, lookahead: Lookahead, tile: TileState, settings: LayerSettings
    ) -> tuple["OffloadView", Lookahead]:
        """Replaces the fetched list by the own queries' and fetches what lacks."""
        forecast, before = self.fetch, self.fetches
        assert forecast is not None and self.own_blocks is not None
        view = self._plan(self.own_blocks, tile, settings)
        view, lookahead = view._commit_fetch(lookahead, settings)
        assert view.fetch is not None
        hits, total = _overlap(forecast.blocks, view.fetch.blocks, tile, settings)
        repaired = view.fetches.fetched - before.fetched
        # Hits and misses of the list count once, as the forecast found them.
        fetches = view.fetches._replace(
            hits=before.hits,
            repaired=before.repaired + repaired,
            recall_hits=before.recall_hits + hits,
            recall_total=before.recall_total + total,
        )
        return view._replace(fetches=fetches, own_blocks=None), lookahead

    def _count_recall(
        self, q: Float[Array, "B 1 N H"], tile: TileState, settings: LayerSettings
    ) -> "OffloadView":
        """Compares the list with the own queries' choice in sampled steps."""
        fetch, offload = self.fetch, settings.offload
        assert fetch is not None and offload is not None
        step = jnp.max(jnp.where(tile.count > 0, tile.length, 0))

        def compare() -> tuple[Array, Array]:
            chosen = self._choose(settings.own_query, q, None, tile, settings)
            assert chosen is not None
            chosen = jnp.where((tile.count > 0)[:, None, None], chosen, -1)
            return _overlap(fetch.blocks, chosen, tile, settings)

        zero = jnp.int32(0)
        hits, total = lax.cond(
            step % offload.recall_every == 0, compare, lambda: (zero, zero)
        )
        fetches = self.fetches._replace(
            recall_hits=self.fetches.recall_hits + hits,
            recall_total=self.fetches.recall_total + total,
        )
        return self._replace(fetches=fetches)

    def _write_token(self, tile: TileState, settings: LayerSettings) -> "OffloadView":
        """The step's token in its tail slot, and the slots' table in the cache."""
        token, slots = self.token, self.layer_cache.slots
        assert token is not None
        batch, heads, count = slots.shape[1:4]
        block, offset = divmod(tile.start[:, None], settings.sparse.block_size)
        block = jnp.broadcast_to(block, (batch, heads))
        rows, kv_heads = jnp.ogrid[:batch, :heads]
        table = self.table
        if self.fetch is None:
            # Every block has its own slot; the table keeps up for a cache that grows.
            slot = jnp.where((tile.count > 0)[:, None], block, count)
            where = (rows, kv_heads, slot)
            step = jnp.broadcast_to(tile.length[:, None], slot.shape)
            table = SlotTable(
                table.blocks.at[where].set(block, mode="drop"),
                table.last_used.at[where].set(step, mode="drop"),
                table.page_table.at[where].set(block, mode="drop"),
            )
        else:
            slot = slot_of(table, block)
            live = (slot >= 0) & (tile.count > 0)[:, None]
            slot = jnp.where(live, slot, count)
        kv = jnp.stack((token.k[:, 0], token.v[:, 0]), axis=2)
        put = {"mode": "drop", "unique_indices": True}
        cache, place, tail = (
            self.layer_cache,
            self.layer_in_stack,
            self.layer_cache.tail,
        )
        if tail is None:
            where = (place, rows, kv_heads, slot, offset)
            slots = slots.at[where].set(kv.astype(slots.dtype), **put)
            cache = cache._replace(slots=slots)
        else:
            # The block's slot takes it when it is full.
            offset = jnp.where(slot < count, offset, tail.shape[3])
            where = (place, rows, kv_heads, offset)
            cache = cache._replace(
                tail=tail.at[where].set(kv.astype(tail.dtype), **put)
            )
        tables = put_table(cache.table, place, table)
        cache = cache._replace(table=tables)
        return self._replace(layer_cache=cache)


def _overlap(
    listed: Int[Array, "B K P"],
    chosen: Int[Array, "B K P"],
    tile: TileState,
    settings: LayerSettings,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Scored blocks of `chosen` that are listed too, and all of them."""
    sparse = settings.sparse
    own = (tile.start // sparse.block_size)[:, None, None]
    by_score = (chosen >= sparse.init_blocks) & (chosen < own - sparse.local_blocks)
    shared = jnp.any(chosen[..., None] == listed[..., None, :], axis=-1)
    return (
        jnp.sum(by_score & shared, dtype=jnp.int32),
        jnp.sum(by_score, dtype=jnp.int32),
    )
