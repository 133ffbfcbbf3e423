"""Fetches of KV blocks, and what a layer does for the next one.

A `BlockFetch` is a block list with the plan of the slots that it takes. It is made by
`plan_fetch`, for the running layer or one layer ahead; its missing blocks are copied to
a staging buffer, and whoever owns the slots commits them. `Lookahead` stands beside the
view of a layer's cache and holds what belongs to the next layer.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan_slots.api import plan_slots
from pallas_kernels.plan_slots.plan import SlotPlan
from sparda_jax.cache.codecs import Parts
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadLayer
from sparda_jax.cache.settings import LayerSettings, OffloadSettings, TileState
from sparda_jax.cache.slots import SlotTable, plan_own_slots, table_at


class BlockFetch(NamedTuple):
    """A block list whose missing blocks are on their way to a layer's slots.

    Attributes:
      blocks: The list [B, K, P], −1 padded.
      plan: The slots that it takes, the blocks to copy, and the slots' contents once
        they are committed.
      staged: The copied blocks as they are stored, B*K*P of them; None before the copy
        started.
    """

    blocks: Int[Array, "B K P"]
    plan: SlotPlan
    staged: Parts | None = None

    @property
    def table(self) -> SlotTable:
        """The layer's slots once the fetch is committed."""
        plan = self.plan
        return SlotTable(plan.blocks, plan.last_used, plan.page_table)

    @property
    def lacks_nothing(self) -> bool:
        """Every block has a slot of its own: there is nothing to copy or commit."""
        return self.table.own_slots


def plan_fetch(
    table: SlotTable,
    blocks: Int[Array, "B K P"],
    rows: Bool[Array, " B"],
    *,
    layer_in_stack: int | Int[Array, ""],
    layer_in_store: int | Int[Array, ""],
    capacity: int,
    tile: TileState,
    settings: LayerSettings,
) -> BlockFetch:
    """Plans the slots of a block list; nothing is copied yet.

    Args:
      table: The layer's slots [B, K, C].
      blocks: What to attend to.
      rows: Rows that take part; the others ask for nothing.
      layer_in_stack: Where the layer is in its `OffloadLayer`.
      layer_in_store: Where it is in the host store.
      capacity: M, blocks of a row and head in the host store.
      tile: The step.
      settings: Block size.
    """
    batch, heads, _ = blocks.shape
    blocks = jnp.where(rows[:, None, None], blocks, -1)

    def by_head(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (batch, heads))

    if table.own_slots:
        return BlockFetch(blocks, plan_own_slots(table, blocks, by_head(tile.length)))
    plan = plan_slots(
        *table,
        blocks,
        step=by_head(tile.length),
        tail_block=by_head(tile.start // settings.sparse.block_size),
        source=layer_in_store * (batch * heads * capacity),
        target=layer_in_stack * table.blocks.size,
    )
    return BlockFetch(blocks, plan)


class StagingPool(NamedTuple):
    """Staging buffers that are free, where the route reuses them; else none."""

    areas: tuple[Parts, ...] = ()

    def take(self) -> tuple[Parts | None, "StagingPool"]:
        """A buffer to fetch into, or None, and the pool without it."""
        if not self.areas:
            return None, self
        *rest, area = self.areas
        return area, StagingPool(tuple(rest))

    def release(self, staged: Parts, offload: OffloadSettings) -> "StagingPool":
        """The pool with a buffer whose blocks are committed."""
        if not offload.route.reuses_staging:
            return self
        return StagingPool((*self.areas, staged))


class NextLayer(NamedTuple):
    """The cache of a later layer, mostly the next, to choose its blocks for it.

    Attributes:
      layer_cache: The `OffloadLayer` that holds it, as of the step before.
      layer_in_stack: Where in it.
      layer_in_store: Where in the host store.
      exists: False behind the last layer: nothing is listed or fetched.
      distance: How many layers behind the running one it is.
    """

    layer_cache: OffloadLayer
    layer_in_stack: int | Int[Array, ""]
    layer_in_store: int | Int[Array, ""]
    exists: bool | Bool[Array, ""]
    distance: int = 1

    def plan(
        self,
        forecast: Float[Array, "B 1 heads F"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> BlockFetch:
        """Chooses the layer's blocks and finds out which of them are missing.

        The layer's index lacks the token of this step. For key means that is the
        window that the step may finish; it is in forced local blocks, so the choice
        is the same (docs/algorithm.md §4.4).
        """
        layer, place = self.layer_cache, self.layer_in_stack
        seen = tile.in_layer(tile.layer + self.distance).selection(
            layer.index, place, forecast=forecast
        )
        blocks = settings.selector.select(seen, settings.config, settings.sparse)
        assert blocks is not None
        return plan_fetch(
            table_at(layer.table, place),
            blocks[:, :, 0],
            (tile.count > 0) & self.exists,
            layer_in_stack=place,
            layer_in_store=self.layer_in_store,
            capacity=tile.num_blocks,
            tile=tile,
            settings=settings,
        )


class Lookahead(NamedTuple):
    """What a layer does for the next one; stands beside the view of its own cache.

    Attributes:
      next_layer: Whom to look ahead for; None for nobody.
      fetch: The next layer's fetch, once planned.
      store: The host blocks; None where they are fetched outside of the program.
      pool: Staging buffers that are free.
    """

    next_layer: NextLayer | None = None
    fetch: BlockFetch | None = None
    store: HostStore | None = None
    pool: StagingPool = StagingPool()

    def plan_next(
        self,
        forecast: Float[Array, "B T heads F"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> "Lookahead":
        """Plans the next layer's fetch."""
        if self.next_layer is None:
            return self
        return self._replace(fetch=self.next_layer.plan(forecast, tile, settings))

    def start(self, settings: LayerSettings) -> "Lookahead":
        """Starts the next layer's copies, beside what this layer computes."""
        if self.fetch is None or self.store is None or settings.offload is None:
            return self
        if self.fetch.lacks_nothing:
            return self
        beside = settings.offload.on_side_stream
        fetch, lookahead = self.copy(self.fetch, settings, on_side_stream=beside)
        return lookahead._replace(fetch=fetch)

    def copy(
        self, fetch: BlockFetch, settings: LayerSettings, *, on_side_stream: bool
    ) -> tuple[BlockFetch, "Lookahead"]:
        """The fetch with its copies started, and the pool without their buffer."""
        assert self.store is not None and settings.offload is not None
        area, pool = self.pool.take()
        parts, route = self.store.flat(), settings.offload.route
        if settings.axis is not None:
            route = route.beside_sums()
        staged = tuple(
            route.fetch(
                part,
                fetch.plan.sources,
                fetch.plan.bound,
                into,
                on_side_stream=on_side_stream,
            )
            for part, into in zip(parts, area or (None,) * len(parts), strict=True)
        )
        return fetch._replace(staged=staged), self._replace(pool=pool)


def order_fetch(
    x: Float[Array, "*shape"],
    arriving: BlockFetch | None,
    leaving: BlockFetch | None,
    settings: LayerSettings,
) -> tuple[Float[Array, "*shape"], BlockFetch | None, BlockFetch | None]:
    """Orders fetches beside compute.

    What uses `x` afterwards comes behind what made it, behind the arrival of this
    layer's blocks, and behind the start of the next layer's fetch. Joined so late, a
    fetch runs beside the rest of its layer and beside the projections and the scores of
    this one. Without it XLA puts start and done side by side, and nothing overlaps.
    """
    offload = settings.offload
    if offload is None or not offload.on_side_stream:
        return x, arriving, leaving
    if leaving is not None and leaving.lacks_nothing:
        return x, arriving, leaving
    staged = None if arriving is None else arriving.staged
    listed = None if leaving is None else (leaving.plan.sources, leaving.plan.bound)
    if staged is None and listed is None:
        return x, arriving, leaving
    x, (staged, listed) = lax.optimization_barrier((x, (staged, listed)))
    if arriving is not None:
        arriving = arriving._replace(staged=staged)
    if leaving is not None:
        assert listed is not None
        sources, bound = listed
        plan = leaving.plan._replace(sources=sources, bound=bound)
        leaving = leaving._replace(plan=plan)
    return x, arriving, leaving
