"""Resident KV cache: all blocks of all layers on the device.

Arrays keep a leading layer axis. With stacked storage there is one `LayerCache` whose
axis is L and every operation takes the layer's index; with per-layer storage there are
L caches whose axis is 1. So an operation never slices a layer out of the stack.

KV is block-major and kernel-ready: [layers, B, K, M, block, 2, H], K then V of one
token side by side. A row's tokens sit at their own positions from 0 on; whatever is
at or behind a row's length is garbage that no reader looks at.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.one_row import as_all_rows, layer_at, with_layer
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.sparse.index import (
    IndexShape,
    IndexState,
    Indices,
    NewTokens,
    PromptEnd,
    TokenKV,
    append_to_index,
    end_prefill_of_index,
    grow_index,
    init_index,
)


class LayerCache(NamedTuple):
    """KV blocks and the selector's index of one layer, or of all (leading axis).

    Attributes:
      kv: [layers, B, K, M, block, 2, H].
      key_bias: NOSA's c per token [layers, B, K, M, block] float32, or None.
      index: What the selector keeps of the keys, by part (`sparse.index`).
      page_table: Where `cache.evict` keeps fewer blocks than M: the place in `kv` and
        `key_bias` of each block, −1 for one that is gone [layers, B, K, M]. None: block
        m is in place m.
    """

    kv: Float[Array, "layers B K C block 2 H"]
    key_bias: Float[Array, "layers B K C block"] | None
    index: IndexState
    page_table: Int[Array, "layers B K M"] | None = None

    @property
    def num_blocks(self) -> int:
        """M, blocks of capacity per row."""
        held = self.kv if self.page_table is None else self.page_table
        return held.shape[3]


class KVCache(NamedTuple):
    """The whole cache: L `LayerCache`s of one layer each, or one stacked one.

    Attributes:
      layers: The layers.
      row: The one row that is looked at, as if the cache had no other; None for all.
    """

    layers: tuple[LayerCache, ...]
    row: Int[Array, ""] | None = None

    @property
    def stacked(self) -> bool:
        """Whether one `LayerCache` holds all layers."""
        return len(self.layers) == 1 and self.layers[0].kv.shape[0] != 1

    @property
    def batch(self) -> int:
        """B."""
        return self.rows if self.row is None else 1

    @property
    def rows(self) -> int:
        """Rows of the arrays."""
        return self.layers[0].kv.shape[1]

    @property
    def num_blocks(self) -> int:
        """M, blocks of capacity per row."""
        return self.layers[0].num_blocks

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.num_blocks * self.layers[0].kv.shape[4]

    def layer(self, index: int | Array) -> tuple[LayerCache, int | Array]:
        """The `LayerCache` that holds layer `index`, and the index inside it."""
        return layer_at(self.layers, index, self.row)

    def replace_layer(self, index: int | Array, layer: LayerCache) -> "KVCache":
        """A copy in which `layer` holds layer `index`."""
        if self.row is not None:
            layer = as_all_rows(layer, self.rows)
        return self._replace(layers=with_layer(self.layers, index, layer))


def check_capacity(capacity: int, sparse: SparseConfig) -> None:
    """Raises ConfigError unless capacity is a positive multiple of the block size."""
    block = sparse.block_size
    if capacity <= 0 or capacity % block:
        raise ConfigError(
            f"capacity={capacity} is not allowed: it must be a positive multiple of "
            f"SparseConfig.block_size={block}"
        )


def init_layer(
    config: ModelConfig,
    sparse: SparseConfig,
    indices: Indices,
    *,
    layers: int,
    batch: int,
    blocks: int,
    dtype: DTypeLike,
    kept: int | None = None,
) -> LayerCache:
    """An empty `LayerCache` whose leading axis is `layers`; with room for `kept`."""
    heads, dim, block = config.num_kv_heads, config.head_dim, sparse.block_size
    lead = (layers, batch, heads)
    shape = IndexShape(layers, batch, heads, blocks, dim, dtype)
    room = (*lead, blocks if kept is None else kept, block)
    return LayerCache(
        kv=jnp.zeros((*room, 2, dim), dtype),
        key_bias=jnp.zeros(room, jnp.float32) if config.key_bias else None,
        index=init_index(indices, shape, sparse),
        page_table=None if kept is None else jnp.full((*lead, blocks), -1, jnp.int32),
    )


def init_cache(
    config: ModelConfig,
    sparse: SparseConfig,
    indices: Indices,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    storage: Literal["stacked", "per_layer"],
    kept: int | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      config: The model's shape.
      sparse: Block and window sizes.
      indices: What the selector keeps of the keys.
      batch: B.
      capacity: Tokens per row, a multiple of the block size.
      dtype: Type of KV and index.
      storage: As the model's layers are stored.
      kept: Blocks of a row that have room; None for all (`cache.evict`).

    Raises:
      ConfigError: If capacity is not a positive multiple of the block size.
    """
    check_capacity(capacity, sparse)
    blocks = capacity // sparse.block_size
    layers, count = config.num_layers, 1
    if storage == "per_layer":
        layers, count = 1, config.num_layers

    def one() -> LayerCache:
        return init_layer(
            config,
            sparse,
            indices,
            layers=layers,
            batch=batch,
            blocks=blocks,
            dtype=dtype,
            kept=kept,
        )

    return KVCache(tuple(one() for _ in range(count)))


def _write_rows(
    store: Float[Array, "layers B K S *rest"],
    new: Float[Array, "B T K *rest"],
    layer: int | Int[Array, ""],
    start: Int[Array, " B"],
) -> Float[Array, "layers B K S *rest"]:
    """Puts T tokens of every row at its `start`.

    One contiguous update-slice a row: XLA does it in place, and a host-resident store
    would accept it as well. The caller sees to it that start + T fits: an update-slice
    would silently move a write that does not.
    """
    new = jnp.moveaxis(new, 1, 2).astype(store.dtype)  # B K T *rest
    batch, steps = new.shape[0], new.shape[2]
    trailing = (0,) * (store.ndim - 4)
    if steps == 1:
        # One token a row: a scatter is one kernel on a GPU, whatever B is.
        rows = jnp.arange(batch)[:, None]
        kv_heads = jnp.arange(new.shape[1])[None, :]
        where = (layer, rows, kv_heads, start[:, None])
        return store.at[where].set(new[:, :, 0], mode="drop", unique_indices=True)

    def put(row: Int[Array, ""], store: Array) -> Array:
        piece = jax.lax.dynamic_index_in_dim(new, row)[None]
        return jax.lax.dynamic_update_slice(
            store, piece, (layer, row, 0, start[row], *trailing)
        )

    if batch == 1:
        return put(jnp.int32(0), store)
    return jax.lax.fori_loop(0, batch, put, store)


def _write_by_table(
    store: Float[Array, "layers B K C block *rest"],
    new: Float[Array, "B 1 K *rest"],
    layer: int | Int[Array, ""],
    start: Int[Array, " B"],
    page_table: Int[Array, "layers B K M"],
) -> Float[Array, "layers B K C block *rest"]:
    """Puts one token of every row where its block is; nowhere if that is gone."""
    batch, heads, places = store.shape[1:4]
    block, offset = divmod(start[:, None], store.shape[4])
    rows, kv_heads = jnp.ogrid[:batch, :heads]
    place = page_table[layer, rows, kv_heads, block]
    place = jnp.where(place < 0, places, place)
    where = (layer, rows, kv_heads, place, offset)
    return store.at[where].set(new[:, 0].astype(store.dtype), mode="drop")


def append_tokens(
    cache: LayerCache,
    layer: int | Int[Array, ""],
    new: TokenKV,
    *,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    sparse: SparseConfig,
    indices: Indices,
) -> LayerCache:
    """Appends T tokens to every row and extends the selector's index.

    Args:
      cache: The cache that holds the layer.
      layer: The layer's index inside it.
      new: The tokens.
      start: Tokens that each row holds already.
      count: Valid new tokens of each row, 0 … T; the others may be written as garbage
        behind the row's end.
      sparse: Window geometry.
      indices: What the selector keeps of the keys.
    """

    def write(store: Array, new: Array) -> Array:
        if cache.page_table is not None:
            return _write_by_table(store, new, layer, start, cache.page_table)
        flat = store.reshape(*store.shape[:3], -1, *store.shape[5:])
        return _write_rows(flat, new, layer, start).reshape(store.shape)

    kv = write(cache.kv, jnp.stack((new.k, new.v), axis=3))
    tokens = NewTokens(new, layer, start, count)
    index = append_to_index(indices, cache.index, tokens, sparse)
    key_bias = cache.key_bias
    if key_bias is not None:
        assert new.key_bias is not None
        key_bias = write(key_bias, new.key_bias)
    return cache._replace(kv=kv, key_bias=key_bias, index=index)


def end_prefill(
    cache: LayerCache,
    layer: int | Int[Array, ""],
    *,
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    ends: Bool[Array, " B"],
    sparse: SparseConfig,
    indices: Indices,
) -> LayerCache:
    """The cache once a prefill call has run all of a layer's tiles (`PromptEnd`).

    Args:
      cache: The cache that holds the layer.
      layer: The layer's index inside it.
      start: Tokens that each row held before the call.
      length: Tokens that each row holds now.
      ends: Rows whose prompt ends with the call.
      sparse: Block and window sizes.
      indices: What the selector keeps of the keys.
    """
    end = PromptEnd(cache.kv, cache.key_bias, layer, start, length, ends)
    index = end_prefill_of_index(indices, cache.index, layer, end, sparse)
    return cache._replace(index=index)


def pad_blocks(array: Array, size: int, value: int = 0) -> Array:
    """The array with its axis of blocks or slots, the fourth, padded to a size."""
    widths = [(0, 0)] * array.ndim
    widths[3] = (0, size - array.shape[3])
    return jnp.pad(array, widths, constant_values=value)


def grow_layer(
    layer: LayerCache, blocks: int, sparse: SparseConfig, indices: Indices
) -> LayerCache:
    """A copy of the layer's cache with room for more blocks."""
    layers, batch, heads, _, _, _, dim = layer.kv.shape
    shape = IndexShape(layers, batch, heads, blocks, dim, layer.kv.dtype)
    key_bias = layer.key_bias
    return LayerCache(
        kv=pad_blocks(layer.kv, blocks),
        key_bias=None if key_bias is None else pad_blocks(key_bias, blocks),
        index=grow_index(indices, layer.index, shape, sparse),
    )


def grow(
    cache: KVCache, capacity: int, sparse: SparseConfig, indices: Indices
) -> KVCache:
    """A copy of the cache with a larger capacity (a multiple of the block size)."""
    blocks = capacity // sparse.block_size
    layers = (grow_layer(layer, blocks, sparse, indices) for layer in cache.layers)
    return KVCache(tuple(layers))
