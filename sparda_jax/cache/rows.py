"""Copies of a cache's rows, in buffers of their own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.resident import KVCache


def _of_layers(
    leaf: Shaped[Array, "layers B *rest"], rows: Sequence[int]
) -> Shaped[Array, "layers N *rest"]:
    return jnp.take(leaf, jnp.asarray(rows), axis=1)


def copy_rows(
    cache: KVCache | OffloadCache, rows: Sequence[int]
) -> KVCache | OffloadCache:
    """A cache of N rows, each a copy of a row of another.

    Args:
      cache: The cache to copy from; it keeps its buffers.
      rows: Which of its rows, N of them; one may be copied several times.
    """

    def copy[Tree](tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: _of_layers(leaf, rows), tree)

    if isinstance(cache, KVCache):
        return copy(cache)
    # What lies in a staging buffer means nothing between two calls.
    return OffloadCache(
        store=cache.store.copy_rows(rows),
        layers=copy(cache.layers),
        first=copy(cache.first),
        staging=tuple(
            cache.store.staging(area[0].shape[0] // cache.batch * len(rows))
            for area in cache.staging
        ),
    )
