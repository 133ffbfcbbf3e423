"""Rows of a cache: copied, taken out, put in, emptied."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadCache, OffloadLayer
from sparda_jax.cache.resident import KVCache, LayerCache
from sparda_jax.cache.slots import empty_table
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.sparse.index import IndexShape, Indices, init_index

Cache = KVCache | OffloadCache


def _of_layers(
    leaf: Shaped[Array, "layers B *rest"], rows: Sequence[int]
) -> Shaped[Array, "layers N *rest"]:
    return jnp.take(leaf, jnp.asarray(rows), axis=1)


def copy_rows(
    cache: Cache, rows: Sequence[int], *, store: HostStore | None = None
) -> Cache:
    """A cache of N rows, each a copy of a row of another.

    Args:
      cache: The cache to copy from; it keeps its buffers.
      rows: Which of its rows, N of them; one may be copied several times.
      store: Of the copy, if it is offloaded; None to make it here.
    """

    def copy[Tree](tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: _of_layers(leaf, rows), tree)

    if isinstance(cache, KVCache):
        return copy(cache)
    # What is in a staging buffer means nothing between two calls.
    return OffloadCache(
        store=cache.store.copy_rows(rows) if store is None else store,
        layers=copy(cache.layers),
        first=copy(cache.first),
        staging=tuple(
            cache.store.staging(area[0].shape[0] // cache.batch * len(rows))
            for area in cache.staging
        ),
    )


@jax.jit
def _take[Tree](tree: Tree, row: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1, 1), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _put[Tree](tree: Tree, one: Tree, row: Int[Array, ""]) -> Tree:
    return put_row_of_layers(tree, one, row)


def put_row_of_layers[Tree](tree: Tree, one: Tree, row: Int[Array, ""]) -> Tree:
    """Arrays [layers, B, …] with those of one row, [layers, 1, …], in its place."""

    def put(old: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, 1)

    return jax.tree.map(put, tree, one)


def take_row(cache: Cache, row: int) -> Cache:
    """A cache of a copy of one row, in buffers of its own, host store included.

    Args:
      cache: The cache to copy from; it keeps its buffers.
      row: Which of its rows. Another one compiles nothing.
    """
    at = jax.device_put(jnp.int32(row))
    if isinstance(cache, KVCache):
        return _take(cache, at)
    layers, first = _take((cache.layers, cache.first), at)
    return OffloadCache(
        store=cache.store.take_row(at),
        layers=layers,
        first=first,
        staging=tuple(
            cache.store.staging(area[0].shape[0] // cache.rows)
            for area in cache.staging
        ),
    )


def put_row(cache: Cache, one: Cache, row: int) -> Cache:
    """The cache with a row as `take_row` gives it put in place of one of its own.

    Args:
      cache: The cache; its buffers are used up.
      one: A cache of one row, with as many blocks and slots; it keeps its buffers.
      row: Which row to replace. Another one compiles nothing.

    Raises:
      ConfigError: If the row has other sizes than the cache's own.
    """
    _check_sizes(cache, one)
    at = jax.device_put(jnp.int32(row))
    if isinstance(cache, KVCache):
        return _put(cache, one, at)
    assert isinstance(one, OffloadCache)
    mine, new = (cache.layers, cache.first), (one.layers, one.first)
    layers, first = _put(mine, new, at)
    store = cache.store.put_row(one.store, at)
    return cache._replace(store=store, layers=layers, first=first)


def _check_sizes(cache: Cache, one: Cache) -> None:
    """Raises ConfigError unless `one` is a row of such a cache."""

    def sizes(of: Cache) -> dict[str, object]:
        slots = of.num_slots if isinstance(of, OffloadCache) else of.num_blocks
        kind = "offload" if isinstance(of, OffloadCache) else "resident"
        return {"kind": kind, "capacity": of.capacity, "device_blocks": slots}

    for name, size in sizes(cache).items():
        got = sizes(one)[name]
        if got != size:
            raise ConfigError(
                f"the row's cache has {name}={got!r}: it must be {size!r}, as the rows "
                "that it joins have"
            )
    if one.rows != 1:
        raise ConfigError(f"the row's cache holds {one.rows} rows: it must be 1")


def reset_row(
    cache: Cache, row: Int[Array, ""], sparse: SparseConfig, indices: Indices
) -> Cache:
    """The cache with one row as a new one has it; for use inside of `jit`.

    Of the host store nothing is touched: what is behind a row's end is never read.

    Args:
      cache: The cache.
      row: Which of its rows.
      sparse: Block and window sizes.
      indices: What the selector keeps of the keys.
    """

    def zeros(x: Array) -> Array:
        return jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)

    def resident(layer: LayerCache) -> LayerCache:
        layers, _, heads, blocks, _, _, dim = layer.kv.shape
        shape = IndexShape(layers, 1, heads, blocks, dim, layer.kv.dtype)
        empty = LayerCache(
            kv=zeros(layer.kv),
            key_bias=jax.tree.map(zeros, layer.key_bias),
            index=init_index(indices, shape, sparse),
        )
        return put_row_of_layers(layer, empty, row)

    def offloaded(layer: OffloadLayer) -> OffloadLayer:
        layers, _, heads, slots, _, _, dim = layer.slots.shape
        dtype = (layer.slots if layer.tail is None else layer.tail).dtype
        shape = IndexShape(layers, 1, heads, cache.num_blocks, dim, dtype)
        empty = OffloadLayer(
            slots=zeros(layer.slots),
            scales=jax.tree.map(zeros, layer.scales),
            tail=jax.tree.map(zeros, layer.tail),
            table=empty_table((layers, 1, heads), slots, cache.num_blocks),
            key_bias=jax.tree.map(zeros, layer.key_bias),
            index=init_index(indices, shape, sparse),
        )
        return put_row_of_layers(layer, empty, row)

    if isinstance(cache, KVCache):
        return cache._replace(layers=tuple(map(resident, cache.layers)))
    first = None if cache.first is None else resident(cache.first)
    return cache._replace(layers=tuple(map(offloaded, cache.layers)), first=first)
