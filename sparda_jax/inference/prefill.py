"""Layer-major prefill: one pass over the layers, query tiles inside each layer.

A layer runs tile after tile, each appending its keys before it attends, so scratch is
one tile's however long the prompt is. How many tiles run is decided at run time from
the longest row: lengths can be bucketed and padding costs next to nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparda_jax.cache.resident import KVCache
from sparda_jax.inference.layer_step import LayerSettings, TileState
from sparda_jax.inference.stack import StackCarry, layer_on_tile, start_stack
from sparda_jax.models.decoder import Decoder, DecoderLayer, run_layers
from sparda_jax.models.rope import Rope, Rotation, rotation


def prefill(
    model: Decoder,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    rope: Rope,
    settings: LayerSettings,
    *,
    tile_size: int,
    capture: bool = False,
) -> StackCarry:
    """Appends `count` tokens of every row to the cache and runs them.

    Args:
      model: The decoder.
      cache: May already hold `start` tokens of every row. Its capacity must be at least
        `start + padded_length(T, tile_size)` for every row.
      tokens: Right-padded token ids.
      start: Tokens that each row holds already (0 for a new prompt).
      count: Valid tokens of each row, 0 … T.
      rope: Rotary frequencies of the request.
      settings: The model and how to attend.
      tile_size: Query tokens per tile; the result does not depend on it.
      capture: Also return the block lists (for tests and evaluation: T×P memory).

    Returns:
      The carry after the last layer: hidden states [B, T, D] (garbage behind each row's
      end), the cache with the prompt in it and, with `capture`, the block lists
      [L, B, K, T, P].
    """
    width = tokens.shape[1]
    if not settings.sparse.mask_future_blocks:
        # The literal reference scores windows that reach past their query (§10.2), so
        # a tile would have to see keys of the next one.
        tile_size = width
    tile_size = min(tile_size, width)
    padded = padded_length(width, tile_size)
    tokens = jnp.pad(tokens, ((0, 0), (0, padded - width)))
    needed = -(-jnp.max(count) // tile_size)

    turn = rotation(rope, start[:, None] + jnp.arange(padded))

    def tile_state(first: int | Array, size: int) -> TileState:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

        return TileState(
            start=start + first,
            count=jnp.clip(count - first, 0, size),
            length=start + count,
            turn=Rotation(cut(turn.cos), cut(turn.sin)),
            decoding=False,
        )

    def body(
        carry: StackCarry, layer: DecoderLayer, layer_index: int | Array
    ) -> StackCarry:
        def on_tile(tile: Array, carry: StackCarry) -> StackCarry:
            first = tile * tile_size
            state = tile_state(first, tile_size)
            return layer_on_tile(
                model, carry, layer, layer_index, first, tile_size, state, settings
            )

        return jax.lax.fori_loop(0, needed, on_tile, carry)

    whole = tile_state(0, padded)
    carry = start_stack(model, cache, tokens, whole, settings, capture=capture)
    carry = run_layers(model, body, carry)
    blocks = None if carry.blocks is None else carry.blocks[:, :, :, :width]
    return carry._replace(hidden=carry.hidden[:, :width], blocks=blocks)


def padded_length(width: int, tile_size: int) -> int:
    """`width` rounded up to whole tiles: the room that prefill writes to."""
    return -(-width // tile_size) * tile_size
