"""Two-level KV cache: all blocks in host memory, those in use in device slots.

Who holds what:

  store      host (`HostStore`): every *full* block of the Lo offloaded layers. Written
             when a prefill call leaves a layer and when a row's tail block fills;
             always in place.
  slots      device, per layer: C blocks per row and kv head, with their table
  tail slot  the slot of a row's last, growing block, whose newest tokens exist only
             there. It is in every list of its row, so it is never evicted
             (`cache.slots`). Where slots hold blocks as they are stored, the growing
             one is in `OffloadLayer.tail`, and its slot is empty until it is full
  index, ... device: the selector's index and NOSA's per-token bias, for all blocks
  first      device: layer 0's whole cache, when nothing shall be fetched for layer 0

A prefill call works on one layer's whole KV in a scratch buffer on the device:
`load_layer` streams what the row holds from before back into it, `write_back_layer`
writes it out and leaves in the slots the blocks that the last token attended to. When
C = M every block has its own slot, slot b holding block b, and nothing is ever fetched.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.codecs import BlockCodec, Parts
from sparda_jax.cache.host_store import CHUNK_BLOCKS, HostStore
from sparda_jax.cache.offload_layer import OffloadLayer, as_slots_hold
from sparda_jax.cache.one_row import as_all_rows, as_one_row, layer_at, with_layer
from sparda_jax.cache.resident import (
    LayerCache,
    check_capacity,
    grow_layer,
    init_layer,
    pad_blocks,
)
from sparda_jax.cache.routes import FetchRoute
from sparda_jax.cache.slots import (
    SlotTable,
    empty_table,
    filled_table,
    slot_of,
    table_at,
)
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig, SparseConfig
from sparda_jax.sparse.index import (
    IndexShape,
    Indices,
    grow_index,
    init_index,
)


class OffloadCache(NamedTuple):
    """The whole cache; see the module's text.

    Attributes:
      store: Host blocks.
      layers: Lo `OffloadLayer`s of one layer each, or one stacked one.
      first: Layer 0 when it is resident: then layer l is the store's l − 1.
      staging: Staging buffers of B*K*P blocks as they are stored, where the route
        reuses them: one, or two when fetches overlap. Of none where every block has a
        slot of its own.
      row: The one row that is looked at, as if the cache had no other; None for all.
    """

    store: HostStore
    layers: tuple[OffloadLayer, ...]
    first: LayerCache | None
    staging: tuple[Parts, ...]
    row: Int[Array, ""] | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.rows if self.row is None else 1

    @property
    def rows(self) -> int:
        """Rows of the arrays."""
        return self.store.lead[1]

    @property
    def num_blocks(self) -> int:
        """M, blocks of capacity per row."""
        return self.store.lead[3]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.num_blocks * self.store.block_shape[0]

    @property
    def num_slots(self) -> int:
        """C."""
        return self.layers[0].slots.shape[3]

    @property
    def resident_layers(self) -> int:
        """How many leading layers are resident: 0 or 1."""
        return 0 if self.first is None else 1

    def place(self, index: int | Array) -> tuple[OffloadLayer, int | Array]:
        """The `OffloadLayer` that holds offloaded layer `index`, and where in it."""
        return layer_at(self.layers, index, self.row)

    def place_in_store(self, index: int | Array) -> int | Array:
        """Where offloaded layer `index` is in the host store; as `place`."""
        return index if self.row is None else index * self.rows + self.row

    def replace_layer(self, index: int | Array, layer: OffloadLayer) -> "OffloadCache":
        """A copy in which `layer` holds offloaded layer `index`."""
        if self.row is not None:
            layer = as_all_rows(layer, self.rows)
        return self._replace(layers=with_layer(self.layers, index, layer))

    @property
    def stacked(self) -> bool:
        """Whether all offloaded layers are in one `OffloadLayer`."""
        return len(self.layers) == 1

    def layer0(self) -> tuple[LayerCache, int | Array]:
        """Resident layer 0, and where in it; as `place` for the offloaded ones."""
        assert self.first is not None
        if self.row is None:
            return self.first, 0
        return as_one_row(self.first, 0, self.row)

    def replace_layer0(self, layer: LayerCache) -> "OffloadCache":
        """A copy in which `layer` is resident layer 0."""
        if self.row is not None:
            layer = as_all_rows(layer, self.rows)
        return self._replace(first=layer)


def init_offload(
    config: ModelConfig,
    sparse: SparseConfig,
    cache: CacheConfig,
    indices: Indices,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    storage: Literal["stacked", "per_layer"],
    width: int,
    staging: int,
    codec: BlockCodec,
    abstract: bool = False,
) -> OffloadCache:
    """An empty cache.

    Args:
      config: The model's shape.
      sparse: Block and window sizes.
      cache: Slots and where layer 0 lives.
      indices: What the selector keeps of the keys.
      batch: B.
      capacity: Tokens per row, a multiple of the block size.
      dtype: Type of KV and index.
      storage: As the model's layers are stored.
      width: P, blocks that a token attends to at most.
      staging: Staging buffers to keep (`OffloadCache.staging`) where anything is ever
        fetched.
      codec: How blocks are stored.
      abstract: Give the host store's type only, to lower without allocating it (call
        under `jax.eval_shape` for the rest).

    Raises:
      ConfigError: If capacity is no positive multiple of the block size, or the slots
        cannot hold a block list, or there is no host memory kind, or the codec keeps
        blocks in slots as they are stored and the model has NOSA's key bias.
    """
    if codec.in_slots and config.key_bias:
        raise ConfigError(
            "CacheConfig.codec='int8_slots' is not allowed with a model of NOSA's key "
            "bias: attention to slots in 8 bits takes none; use codec='int8'"
        )
    check_capacity(capacity, sparse)
    blocks, heads = capacity // sparse.block_size, config.num_kv_heads
    dim = config.head_dim
    slots = cache.slots(blocks, width)
    resident = 0 if cache.layer0 == "offload" else 1
    offloaded = config.num_layers - resident
    per_layer = offloaded if storage == "stacked" else 1
    block = (sparse.block_size, 2, dim)

    def one() -> OffloadLayer:
        lead = (per_layer, batch, heads)
        shape = IndexShape(per_layer, batch, heads, blocks, dim, dtype)
        held = tuple(
            jnp.zeros((*lead, slots, *part.shape), part.dtype)
            for part in codec.slot_shapes(block, dtype)
        )
        return OffloadLayer(
            slots=held[0],
            scales=held[1] if codec.in_slots else None,
            tail=jnp.zeros((*lead, *block), dtype) if codec.in_slots else None,
            table=empty_table(lead, slots, blocks),
            key_bias=(
                jnp.zeros((*lead, blocks, sparse.block_size), jnp.float32)
                if config.key_bias
                else None
            ),
            index=init_index(indices, shape, sparse),
        )

    first = None
    if resident:
        first = init_layer(
            config,
            sparse,
            indices,
            layers=1,
            batch=batch,
            blocks=blocks,
            dtype=dtype,
        )
    store = HostStore.empty(
        (offloaded, batch, heads, blocks), block, dtype, codec, abstract=abstract
    )
    count = 1 if storage == "stacked" else offloaded
    return OffloadCache(
        store=store,
        layers=tuple(one() for _ in range(count)),
        first=first,
        staging=_staging(
            store, batch * heads * width, staging if slots < blocks else 0
        ),
    )


def _staging(store: HostStore, entries: int, areas: int) -> tuple[Parts, ...]:
    return tuple(store.staging(entries) for _ in range(areas))


def grow_offload(
    cache: OffloadCache,
    capacity: int,
    sparse: SparseConfig,
    config: CacheConfig,
    indices: Indices,
    *,
    width: int,
    staging: int,
    store: HostStore | None = None,
) -> OffloadCache:
    """A copy of the cache with a larger capacity (a multiple of the block size).

    Args:
      cache: The cache; it keeps its buffers.
      capacity: Tokens of a row.
      sparse: Block and window sizes.
      config: Slots.
      indices: What the selector keeps of the keys.
      width: Most blocks of a list.
      staging: As of `init_offload`.
      store: The larger host store; None to make it here.
    """
    blocks = capacity // sparse.block_size
    slots = config.slots(blocks, width)
    # A slot for every block is that block's own: there is no other order.
    assert slots < blocks or cache.num_slots == cache.num_blocks

    def one(layer: OffloadLayer) -> OffloadLayer:
        layers, batch, heads, _, _, _, dim = layer.slots.shape
        shape = IndexShape(layers, batch, heads, blocks, dim, cache.store.dtype)
        key_bias, scales = layer.key_bias, layer.scales
        return OffloadLayer(
            slots=pad_blocks(layer.slots, slots),
            scales=None if scales is None else pad_blocks(scales, slots),
            tail=layer.tail,
            table=SlotTable(
                pad_blocks(layer.table.blocks, slots, -1),
                pad_blocks(layer.table.last_used, slots, -1),
                pad_blocks(layer.table.page_table, blocks, -1),
            ),
            key_bias=None if key_bias is None else pad_blocks(key_bias, blocks),
            index=grow_index(indices, layer.index, shape, sparse),
        )

    first = cache.first
    _, batch, heads, _ = cache.store.lead
    return OffloadCache(
        store=cache.store.grow(blocks) if store is None else store,
        layers=tuple(one(layer) for layer in cache.layers),
        first=None if first is None else grow_layer(first, blocks, sparse, indices),
        staging=_staging(
            cache.store, batch * heads * width, staging if slots < blocks else 0
        ),
    )


def _at(stack: Array, index: int | Array) -> Array:
    """One layer of a stack, its axis kept."""
    if stack.shape[0] == 1:
        return stack
    return lax.dynamic_slice_in_dim(stack, index, 1, 0)


def _put(stack: Array, layer: Array, index: int | Array) -> Array:
    """The stack with one layer replaced."""
    if stack.shape[0] == 1:
        return layer
    return lax.dynamic_update_slice_in_dim(stack, layer, index, 0)


def _put_tree(stack: OffloadLayer, layer: OffloadLayer, index: int | Array):
    return jax.tree.map(lambda s, x: _put(s, x, index), stack, layer)


def scratch_kv(cache: OffloadCache) -> Float[Array, "1 B K M block 2 H"]:
    """Room on the device for one layer's whole KV."""
    store = cache.store
    _, _, heads, blocks = store.lead
    return jnp.zeros((1, cache.batch, heads, blocks, *store.block_shape), store.dtype)


def load_layer(
    cache: OffloadCache,
    index: int | Array,
    scratch: Float[Array, "1 B K M block 2 H"],
    start: Int[Array, " B"],
) -> LayerCache:
    """One offloaded layer's cache on the device, with the `start` tokens of every row.

    Args:
      cache: The cache.
      index: The layer, counted among the offloaded ones.
      scratch: Buffer to fill; what is behind a row's end in it is garbage.
      start: Tokens that each row holds.
    """
    layer, place = cache.place(index)
    batch, (_, _, heads, blocks) = cache.batch, cache.store.lead
    block, chunk = cache.store.block_shape[0], min(CHUNK_BLOCKS, blocks)
    needed = -(-jnp.max(start) // (chunk * block))

    def load(number: Array, scratch: Array) -> Array:
        first = jnp.minimum(number * chunk, blocks - chunk)
        piece = cache.store.read(index, first, chunk, row=cache.row)
        # Behind a row's end is what a row before it left, which may be no number.
        held = (first + jnp.arange(chunk)) * block < start[:, None]
        piece = jnp.where(held[None, :, None, :, None, None, None], piece, 0)
        return lax.dynamic_update_slice_in_dim(scratch, piece, first, 3)

    kv = lax.fori_loop(0, needed, load, scratch)
    # The tail's newest tokens are in its slot alone.
    tail = (start // block)[:, None]
    slot = slot_of(table_at(layer.table, place), tail)
    rows, kv_heads = jnp.arange(batch)[:, None], jnp.arange(heads)[None]
    if layer.tail is None:
        held = layer.slots[place, rows, kv_heads, jnp.maximum(slot, 0)]
    else:
        held = layer.tail[place]
    partial = (slot >= 0) & (start % block != 0)[:, None]
    where = jnp.where(partial, tail, blocks)
    kv = kv.at[0, rows, kv_heads, where].set(held, mode="drop")
    return LayerCache(
        kv=kv,
        key_bias=None if layer.key_bias is None else _at(layer.key_bias, place),
        index=jax.tree.map(lambda x: _at(x, place), layer.index),
    )


def write_back_layer(
    cache: OffloadCache,
    index: int | Array,
    working: LayerCache,
    last: Int[Array, "B K P"] | None,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    route: FetchRoute | None,
) -> OffloadCache:
    """Writes a layer's new blocks to the host and fills its slots.

    Args:
      cache: The cache.
      index: The layer, counted among the offloaded ones.
      working: The layer's cache with the new tokens in it.
      last: The block lists of each row's last token, or None when it read all blocks:
        then the newest ones stay, as many as there are slots.
      start: Tokens that each row held before.
      count: New tokens of each row; a row without any keeps its slots.
      route: How blocks are fetched, and written where it can.
    """
    layer, place = cache.place(index)
    batch, (_, _, heads, blocks) = cache.batch, cache.store.lead
    block, slots = cache.store.block_shape[0], cache.num_slots
    end = start + count
    fresh = count > 0
    store = cache.store.put_new(
        working.kv,
        start // block,
        end // block,
        layer=index,
        row=jnp.int32(0) if cache.row is None else cache.row,
        route=route,
    )

    held = -(-end // block)
    if last is None or slots == blocks:
        slot = jnp.arange(slots)
        block_of = slot if slots == blocks else held[:, None] - 1 - slot
        own = (block_of >= 0) & (block_of < held[:, None])
        wanted = jnp.where(own, block_of, -1)[:, None]
        wanted = jnp.broadcast_to(wanted, (batch, heads, slots))
    else:
        padding = slots - last.shape[-1]
        wanted = jnp.pad(last, ((0, 0), (0, 0), (0, padding)), constant_values=-1)
    rows, kv_heads = jnp.ogrid[:batch, :heads]
    filled = working.kv[0, rows[..., None], kv_heads[..., None], jnp.maximum(wanted, 0)]
    full = start // block, end // block
    filled, scales, tail = as_slots_hold(store.codec, filled, working.kv, wanted, full)
    stamps = jnp.where(wanted >= 0, end[:, None, None], -1)

    def keep(new: Array, old: Array) -> Array:
        """The new value for rows with new tokens."""
        if cache.row is not None:  # It has some: no copy of its old slots is held.
            return new[None].astype(old.dtype)
        shape = (1, batch, *(1,) * (old.ndim - 2))
        return jnp.where(fresh.reshape(shape), new[None].astype(old.dtype), old)

    new = (filled, scales, tail, filled_table(wanted, stamps, blocks))
    old = (layer.slots, layer.scales, layer.tail, layer.table)
    old = jax.tree.map(lambda x: _at(x, place), old)
    filled, scales, tail, table = jax.tree.map(keep, new, old)
    changed = OffloadLayer(
        slots=filled,
        scales=scales,
        tail=tail,
        table=table,
        key_bias=working.key_bias,
        index=working.index,
    )
    cache = cache.replace_layer(index, _put_tree(layer, changed, place))
    return cache._replace(store=store)


def write_back_full_blocks(
    cache: OffloadCache, full: Bool[Array, " B"], block: Int[Array, " B"]
) -> OffloadCache:
    """Copies the tail blocks that have filled up to the host, all layers at once.

    Args:
      cache: The cache.
      full: Rows whose tail block is full now.
      block: That block's id, per row.

    The loop has as many passes as there are such rows; mostly it is none. A slot then
    holds what is stored, so that it does not matter when the block leaves it.
    """
    order = jnp.argsort(~full, stable=True)
    codec, slots = cache.store.codec, tuple(layer.held for layer in cache.layers)

    def save(number: Array, loop: tuple) -> tuple:
        store, changed = loop
        given = order[number]
        row = given if cache.row is None else cache.row
        pieces, kept = [], []
        for layer, held in zip(cache.layers, changed or slots, strict=True):
            table = SlotTable(
                *(lax.dynamic_index_in_dim(x, row, 1, False) for x in layer.table)
            )
            slot = jnp.maximum(slot_of(table, block[given]), 0)  # layers K
            depth, heads = jnp.ogrid[: slot.shape[0], : slot.shape[1]]
            where = (depth, row, heads, slot)
            tail = held[0][where]
            if layer.tail is not None:
                tail = lax.dynamic_index_in_dim(layer.tail, row, 1, False)
            pieces.append(tail)
            if changed:
                pairs = zip(held, codec.for_slots(tail), strict=True)
                kept.append(tuple(x.at[where].set(new) for x, new in pairs))
        piece = jnp.concatenate(pieces)[:, None, :, None]  # Lo 1 K 1 block 2 H
        return store.write(piece, row=row, block=block[given]), tuple(kept)

    count = jnp.sum(full, dtype=jnp.int32)
    # Of an exact codec nothing changes, and no slots travel through the loop.
    begun = (cache.store, () if codec.exact else slots)
    store, changed = lax.fori_loop(0, count, save, begun)
    pairs = zip(cache.layers, changed or slots, strict=True)
    layers = tuple(layer.holding(held) for layer, held in pairs)
    return cache._replace(store=store, layers=layers)
