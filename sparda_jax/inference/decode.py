"""One decode step: one token of every row through all layers."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.inference.stack import (
    Cache,
    StackCarry,
    end_stack,
    layer_on_tile,
    start_stack,
)
from sparda_jax.models.decoder import Decoder, DecoderLayer, run_layers
from sparda_jax.models.rope import Rope, rope_cos_sin_at


def decode_step(
    model: Decoder,
    cache: Cache,
    tokens: Int[Array, " B"],
    lengths: Int[Array, " B"],
    active: Bool[Array, " B"],
    rope: Rope,
    settings: LayerSettings,
    *,
    capture: bool = False,
) -> StackCarry:
    """Feeds one token to every row.

    Args:
      model: The decoder.
      cache: Holds `lengths` tokens of every row, with room for one more.
      tokens: The tokens to feed.
      lengths: Tokens that each row holds.
      active: Rows that have not ended; the others leave no trace but garbage behind
        their end.
      rope: Rotary frequencies of the request.
      settings: The model and how to attend.
      capture: Also return the block lists.

    Returns:
      The carry after the last layer: hidden states [B, 1, D], the cache with the tokens
      in it and, with `capture`, the block lists [L, B, K, 1, P].
    """
    tile = TileState(
        start=lengths,
        count=active.astype(jnp.int32),
        length=lengths + 1,
        rope_cos_sin=rope_cos_sin_at(rope, lengths[:, None]),
        num_blocks=cache.num_blocks,
        decoding=True,
    )

    def body(
        carry: StackCarry, layer: DecoderLayer, layer_index: int | Array
    ) -> StackCarry:
        return layer_on_tile(model, carry, layer, layer_index, 0, 1, tile, settings)

    carry = start_stack(model, cache, tokens[:, None], tile, settings, capture=capture)
    if settings.offload is None:
        return run_layers(model, body, carry)
    # Layer 0 is like no other: nobody looked ahead for it, and it may be resident.
    carry = run_layers(model, body, carry, unscanned_layers=1)
    return end_stack(carry, lengths, tile.count, settings)
