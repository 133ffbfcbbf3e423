"""A resident cache that gives back the blocks which no answer will list.

A selector that `evicts` settles at a prompt's end which of its blocks later tokens can
list. A layer's prompt therefore runs on a scratch buffer with room for all blocks, one
for all layers, and leaves in the cache those of its last token's list; behind them is
room for the blocks of the answer:

  places 0 … P − 1         the list of the prompt's last token, its own block included
  places P … P + R − 1     the blocks that follow

What is attended to, and in which order, is what a cache of all blocks attends to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sparda_jax.cache.resident import KVCache, LayerCache
from sparda_jax.cache.settings import LayerSettings, TileState


class Scratch(NamedTuple):
    """Room for one layer's whole prompt.

    Attributes:
      kv: [1, B, K, M, block, 2, H].
      key_bias: [1, B, K, M, block] float32, or None.
    """

    kv: Float[Array, "1 B K M block 2 H"]
    key_bias: Float[Array, "1 B K M block"] | None


def kept_blocks(settings: LayerSettings, capacity: int, new: int) -> int | None:
    """Blocks of a row, kv head and layer that a cache has room for; None for all.

    Args:
      settings: How to attend.
      capacity: Tokens of prompt and answer.
      new: Tokens of the answer, at most.
    """
    size = settings.sparse.block_size
    blocks = capacity // size
    kept = settings.selector.list_width(blocks, settings.sparse) + -(-new // size)
    return kept if settings.evict and kept < blocks else None


def new_scratch(cache: KVCache) -> Scratch:
    """Scratch for the rows of a cache that are looked at."""
    layer = cache.layers[0]
    _, _, heads, _, *block = layer.kv.shape
    lead = (1, cache.batch, heads, cache.num_blocks)
    key_bias = None
    if layer.key_bias is not None:
        key_bias = jnp.zeros((*lead, block[0]), layer.key_bias.dtype)
    return Scratch(jnp.zeros((*lead, *block), layer.kv.dtype), key_bias)


def whole_layer(cache: KVCache, index: int | Array, scratch: Scratch) -> LayerCache:
    """A layer with room for all blocks, before its prompt runs.

    Args:
      cache: The cache.
      index: The layer.
      scratch: What it held means nothing.
    """
    layer, place = cache.layer(index)

    def one(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, place, 1, 0)

    return LayerCache(*scratch, index=jax.tree.map(one, layer.index))


def keep_listed(
    cache: KVCache,
    index: int | Array,
    whole: LayerCache,
    length: Int[Array, " B"],
    tile: TileState,
    settings: LayerSettings,
) -> KVCache:
    """The cache with what a layer keeps of its prompt.

    Args:
      cache: The cache.
      index: The layer.
      whole: The layer after its prompt.
      length: Tokens of each row.
      tile: A decode step at the prompt's last token.
      settings: How to attend.
    """
    seen = tile.selection(whole.index, 0)
    lists = settings.selector.select(seen, settings.config, settings.sparse)
    assert lists is not None  # there are more blocks than a list holds
    lists = lists[:, :, 0]
    layer, place = cache.layer(index)
    batch, heads, width = lists.shape
    size, blocks, places = layer.kv.shape[4], cache.num_blocks, layer.kv.shape[3]

    def listed(x: Array) -> Array:
        at = jnp.maximum(lists, 0).reshape(*lists.shape, *(1,) * (x.ndim - 4))
        return jnp.take_along_axis(x[0], at, axis=2)[None]

    def put(store: Array, new: Array) -> Array:
        at = (place, *(0,) * (store.ndim - 1))
        return lax.dynamic_update_slice(store, new.astype(store.dtype), at)

    last = (jnp.maximum(length - 1, 0) // size)[:, None]
    behind = width + jnp.arange(blocks) - last - 1
    follows = (behind >= width) & (behind < places)
    table = jnp.where(follows, behind, -1)[:, None]
    table = jnp.broadcast_to(table, (batch, heads, blocks)).astype(jnp.int32)
    rows, kv_heads = jnp.ogrid[:batch, :heads]
    block = jnp.where(lists >= 0, lists, blocks)
    where = (rows[..., None], kv_heads[..., None], block)
    table = table.at[where].set(jnp.arange(width, dtype=jnp.int32), mode="drop")
    assert layer.page_table is not None
    key_bias = layer.key_bias
    if key_bias is not None and whole.key_bias is not None:
        key_bias = put(key_bias, listed(whole.key_bias))
    kept = LayerCache(
        kv=put(layer.kv, listed(whole.kv)),
        key_bias=key_bias,
        index=jax.tree.map(put, layer.index, whole.index),
        page_table=put(layer.page_table, table[None]),
    )
    return cache.replace_layer(index, kept)
