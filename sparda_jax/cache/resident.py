"""Resident KV cache: all blocks of all layers on the device.

Arrays keep a leading layer axis. With stacked storage there is one `LayerCache` whose
axis is L and every operation takes the layer's index; with per-layer storage there are
L caches whose axis is 1. So an operation never slices a layer out of the stack.

KV is block-major and kernel-ready: [layers, B, K, M, block, 2, H], K then V of one
token side by side. A row's tokens sit at their own positions from 0 on; whatever lies
at or behind a row's length is garbage that no reader looks at.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.sparse.compression import CompressedKeys, append_windows


class LayerCache(NamedTuple):
    """KV blocks and compressed keys of one layer, or of all (leading axis).

    Attributes:
      kv: [layers, B, K, M, block, 2, H].
      keys: Compressed keys (specification §2.2).
      key_bias: NOSA's c per token [layers, B, K, M, block] float32, or None.
      importance: NOSA's c averaged over the same windows as keys (H = 1), or None.
    """

    kv: Float[Array, "layers B K M block 2 H"]
    keys: CompressedKeys
    key_bias: Float[Array, "layers B K M block"] | None
    importance: CompressedKeys | None

    @property
    def num_blocks(self) -> int:
        """M, blocks of capacity per row."""
        return self.kv.shape[3]


class KVCache(NamedTuple):
    """The whole cache: L `LayerCache`s of one layer each, or one stacked one."""

    layers: tuple[LayerCache, ...]

    @property
    def stacked(self) -> bool:
        """Whether one `LayerCache` holds all layers."""
        return len(self.layers) == 1 and self.layers[0].kv.shape[0] != 1

    @property
    def batch(self) -> int:
        """B."""
        return self.layers[0].kv.shape[1]

    @property
    def num_blocks(self) -> int:
        """M, blocks of capacity per row."""
        return self.layers[0].num_blocks

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        kv = self.layers[0].kv
        return kv.shape[3] * kv.shape[4]

    def layer(self, index: int | Array) -> tuple[LayerCache, int | Array]:
        """The `LayerCache` that holds layer `index`, and the index inside it."""
        if len(self.layers) == 1:
            return self.layers[0], index
        return self.layers[index], 0  # pyrefly: ignore[bad-index]

    def replace_layer(self, index: int | Array, layer: LayerCache) -> "KVCache":
        """A copy in which `layer` holds layer `index`."""
        if len(self.layers) == 1:
            return KVCache((layer,))
        assert isinstance(index, int)
        return KVCache((*self.layers[:index], layer, *self.layers[index + 1 :]))


def check_capacity(capacity: int, sparse: SparseConfig) -> None:
    """Raises ConfigError unless capacity is a positive multiple of the block size."""
    block = sparse.block_size
    if capacity <= 0 or capacity % block:
        raise ConfigError(
            f"capacity={capacity} is not allowed: it must be a positive multiple of "
            f"SparseConfig.block_size={block}"
        )


def empty_keys(
    lead: tuple[int, ...], windows: int, width: int, dtype: DTypeLike
) -> CompressedKeys:
    """Compressed keys without a window; `lead` is (layers, B, K)."""
    return CompressedKeys(
        windows=jnp.zeros((*lead, windows, width), dtype),
        halves=jnp.zeros((*lead, 2, width), jnp.float32),
    )


def init_layer(
    config: ModelConfig,
    sparse: SparseConfig,
    *,
    layers: int,
    batch: int,
    blocks: int,
    dtype: DTypeLike,
) -> LayerCache:
    """An empty `LayerCache` whose leading axis is `layers`."""
    heads, dim, block = config.num_kv_heads, config.head_dim, sparse.block_size
    windows = blocks * sparse.windows_per_block
    lead = (layers, batch, heads)
    biased = config.key_bias
    return LayerCache(
        kv=jnp.zeros((*lead, blocks, block, 2, dim), dtype),
        keys=empty_keys(lead, windows, dim, dtype),
        key_bias=jnp.zeros((*lead, blocks, block), jnp.float32) if biased else None,
        importance=empty_keys(lead, windows, 1, jnp.float32) if biased else None,
    )


def init_cache(
    config: ModelConfig,
    sparse: SparseConfig,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    storage: Literal["stacked", "per_layer"],
) -> KVCache:
    """An empty cache.

    Args:
      config: The model's shape.
      sparse: Block and window sizes.
      batch: B.
      capacity: Tokens per row, a multiple of the block size.
      dtype: Type of KV and compressed keys.
      storage: As the model's layers are stored.

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
            config, sparse, layers=layers, batch=batch, blocks=blocks, dtype=dtype
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


def append_tokens(
    cache: LayerCache,
    layer: int | Int[Array, ""],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None,
    *,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    sparse: SparseConfig,
) -> LayerCache:
    """Appends T tokens to every row and extends its compressed keys.

    Args:
      cache: The cache that holds the layer.
      layer: The layer's index inside it.
      k: Keys after RoPE.
      v: Values.
      key_bias: NOSA's c of the new tokens, or None.
      start: Tokens that each row holds already.
      count: Valid new tokens of each row, 0 … T; the others may be written as garbage
        behind the row's end.
      sparse: Window geometry.
    """

    def write(store: Array, new: Array) -> Array:
        flat = store.reshape(*store.shape[:3], -1, *store.shape[5:])
        return _write_rows(flat, new, layer, start).reshape(store.shape)

    kv = write(cache.kv, jnp.stack((k, v), axis=3))
    keys = append_windows(cache.keys, layer, k, start=start, count=count, sparse=sparse)
    if key_bias is None:
        return cache._replace(kv=kv, keys=keys)
    assert cache.key_bias is not None and cache.importance is not None
    return LayerCache(
        kv=kv,
        keys=keys,
        key_bias=write(cache.key_bias, key_bias),
        importance=append_windows(
            cache.importance,
            layer,
            key_bias[..., None],
            start=start,
            count=count,
            sparse=sparse,
        ),
    )


def grow_layer(layer: LayerCache, blocks: int, sparse: SparseConfig) -> LayerCache:
    """A copy of the layer's cache with room for more blocks."""

    def pad(array: Array, size: int) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[3] = (0, size - array.shape[3])
        return jnp.pad(array, widths)

    def compressed(keys: CompressedKeys) -> CompressedKeys:
        windows = pad(keys.windows, blocks * sparse.windows_per_block)
        return keys._replace(windows=windows)

    return LayerCache(
        kv=pad(layer.kv, blocks),
        keys=compressed(layer.keys),
        key_bias=None if layer.key_bias is None else pad(layer.key_bias, blocks),
        importance=None if layer.importance is None else compressed(layer.importance),
    )


def grow(cache: KVCache, capacity: int, sparse: SparseConfig) -> KVCache:
    """A copy of the cache with a larger capacity (a multiple of the block size)."""
    blocks = capacity // sparse.block_size
    return KVCache(tuple(grow_layer(layer, blocks, sparse) for layer in cache.layers))
