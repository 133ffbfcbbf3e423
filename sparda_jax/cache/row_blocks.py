"""Blocks and index of one row: taken out and put in, a run of blocks at a time.

For use inside of `jit`. What is taken is on the device; blocks of a host store are
taken as they are stored, so that what is put back is the same bit for bit.
"""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int

from sparda_jax.cache.memory import to_device, to_host
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.resident import KVCache
from sparda_jax.cache.rows import put_row_of_layers

Cache = KVCache | OffloadCache


def _on_device(cache: Cache) -> Any:
    """Arrays [layers, B, K, M, …] on the device."""
    if isinstance(cache, KVCache):
        return tuple((layer.kv, layer.key_bias) for layer in cache.layers)
    first = None if cache.first is None else (cache.first.kv, cache.first.key_bias)
    return tuple(layer.key_bias for layer in cache.layers), first


def _with_device(cache: Cache, arrays: Any) -> Cache:
    """The cache with such arrays in it."""
    if isinstance(cache, KVCache):
        layers = (
            layer._replace(kv=kv, key_bias=bias)
            for layer, (kv, bias) in zip(cache.layers, arrays, strict=True)
        )
        return cache._replace(layers=tuple(layers))
    biases, first = arrays
    layers = (
        layer._replace(key_bias=bias)
        for layer, bias in zip(cache.layers, biases, strict=True)
    )
    own = None
    if cache.first is not None:
        own = cache.first._replace(kv=first[0], key_bias=first[1])
    return cache._replace(layers=tuple(layers), first=own)


def take_blocks(
    cache: Cache, row: Int[Array, ""], first: Int[Array, ""], count: int
) -> Any:
    """Blocks first … first + count − 1 of a row in all layers.

    Args:
      cache: The cache.
      row: Which of its rows.
      first: The first block.
      count: How many.
    """

    def cut(x: Array) -> Array:
        rest = x.shape[4:]
        at = (0, row, 0, first, *(0,) * len(rest))
        sizes = (x.shape[0], 1, x.shape[2], count, *rest)
        return lax.dynamic_slice(x, at, sizes)

    stored = ()
    if isinstance(cache, OffloadCache):
        stored = tuple(to_device(cut(part)) for part in cache.store.parts)
    return stored, jax.tree.map(cut, _on_device(cache))


def put_blocks(
    cache: Cache, blocks: Any, row: Int[Array, ""], first: Int[Array, ""]
) -> Cache:
    """The cache with what `take_blocks` gave as blocks of a row, from `first` on."""

    def put(x: Array, new: Array) -> Array:
        at = (0, row, 0, first, *(0,) * (x.ndim - 4))
        return lax.dynamic_update_slice(x, new, at)

    stored, on_device = blocks
    changed = jax.tree.map(put, _on_device(cache), on_device)
    cache = _with_device(cache, changed)
    if not isinstance(cache, OffloadCache):
        return cache
    pairs = zip(cache.store.parts, stored, strict=True)
    parts = tuple(put(part, to_host(new)) for part, new in pairs)
    store = type(cache.store)(
        parts, cache.store.block_shape, cache.store.dtype, cache.store.codec
    )
    return cache._replace(store=store)


def _indices(cache: Cache) -> Any:
    layers = tuple(layer.index for layer in cache.layers)
    if isinstance(cache, KVCache) or cache.first is None:
        return layers, None
    return layers, cache.first.index


def take_index(cache: Cache, row: Int[Array, ""]) -> Any:
    """What the selector keeps of a row's keys, in all layers."""
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, row, 1, 1), _indices(cache)
    )


def put_index(cache: Cache, index: Any, row: Int[Array, ""]) -> Cache:
    """The cache with what `take_index` gave as a row's index."""
    layers, first = put_row_of_layers(_indices(cache), index, row)
    changed = tuple(
        layer._replace(index=new)
        for layer, new in zip(cache.layers, layers, strict=True)
    )
    if isinstance(cache, KVCache):
        return cache._replace(layers=changed)  # pyrefly: ignore
    own = None if cache.first is None else cache.first._replace(index=first)
    return cache._replace(layers=changed, first=own)  # pyrefly: ignore
