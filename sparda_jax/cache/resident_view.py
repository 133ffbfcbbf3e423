"""A layer's view of a resident cache: all of its blocks are on the device."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from sparda_jax.cache.attention import attended_bias, decode_attention, token_attention
from sparda_jax.cache.prefetch import Lookahead, order_fetch
from sparda_jax.cache.resident import LayerCache, append_tokens
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.sparse.index import TokenKV


class ResidentView(NamedTuple):
    """A layer of a resident cache.

    Attributes:
      layer_cache: The `LayerCache` that holds it.
      layer_in_stack: Where in it.
      blocks: The tile's block lists once selected; None for all causal blocks.
    """

    layer_cache: LayerCache
    layer_in_stack: int | Int[Array, ""]
    blocks: Int[Array, "B K T P"] | None = None

    def behind(self, lookahead: Lookahead) -> tuple["ResidentView", Lookahead]:
        """Itself: nobody looks ahead for a resident layer."""
        return self, lookahead

    def shown_to(self, lookahead: Lookahead) -> Lookahead:
        """As it is: a resident layer is in no stack of the layers behind it."""
        return lookahead

    def append(
        self, new: TokenKV, tile: TileState, settings: LayerSettings
    ) -> "ResidentView":
        """Puts the tile's tokens into the cache."""
        cache = append_tokens(
            self.layer_cache,
            self.layer_in_stack,
            new,
            start=tile.start,
            count=tile.count,
            sparse=settings.sparse,
            indices=settings.indices,
        )
        return self._replace(layer_cache=cache)

    def select(
        self,
        q: Float[Array, "B T N H"],
        forecast: Float[Array, "B T heads F"] | None,
        tile: TileState,
        settings: LayerSettings,
    ) -> "ResidentView":
        """Chooses the tile's blocks."""
        cache = self.layer_cache
        seen = tile.selection(cache.index, self.layer_in_stack, q=q, forecast=forecast)
        blocks = settings.chooser.select(
            seen, settings.config, settings.sparse, settings.implementation
        )
        return self._replace(blocks=blocks)

    def own_scores(
        self, q: Float[Array, "B T N H"], tile: TileState, settings: LayerSettings
    ) -> Float[Array, "B K T M"]:
        """Block scores of the layer's own queries, to be handed on."""
        seen = tile.selection(self.layer_cache.index, self.layer_in_stack, q=q)
        return settings.score_by_own_query(seen)

    def order(
        self, x: Float[Array, "*shape"], lookahead: Lookahead, settings: LayerSettings
    ) -> tuple[Float[Array, "*shape"], "ResidentView", Lookahead]:
        """Orders the next layer's fetch beside what follows (`order_fetch`)."""
        x, _, leaving = order_fetch(x, None, lookahead.fetch, settings)
        return x, self, lookahead._replace(fetch=leaving)

    def commit(
        self,
        q: Float[Array, "B T N H"],
        lookahead: Lookahead,
        tile: TileState,
        settings: LayerSettings,
    ) -> tuple["ResidentView", Lookahead]:
        """Nothing: this layer's blocks are all here."""
        del q, tile, settings
        return self, lookahead

    def attend(
        self, q: Float[Array, "B T N H"], tile: TileState, settings: LayerSettings
    ) -> Float[Array, "B T N H"]:
        """Attention of the tile over its block lists."""
        cache, layer = self.layer_cache, self.layer_in_stack
        key_bias = attended_bias(cache.key_bias, tile, settings)
        if not tile.decoding:
            return block_sparse_attention(
                q,
                cache.kv,
                q_start=tile.start,
                block_indices=self.blocks,
                layer=layer,
                key_bias=key_bias,
                implementation=settings.implementation,
            )
        if settings.selector.attends_tokens:
            return token_attention(
                q, cache.kv, key_bias, cache.index, layer, tile, settings
            )
        blocks = None if self.blocks is None else self.blocks[:, :, 0]
        slots = blocks  # in a resident cache slot c holds block c
        if cache.page_table is not None:
            assert blocks is not None
            places = jnp.take_along_axis(
                cache.page_table[layer], jnp.maximum(blocks, 0), axis=-1
            )
            slots = jnp.where(blocks >= 0, places, -1)
        return decode_attention(
            q, cache.kv, slots, blocks, key_bias, layer, tile, settings
        )
