"""Attention of one decode step over a layer's slots: what both views share."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from sparda_jax.cache.settings import LayerSettings, TileState


def attended_bias(
    key_bias: Float[Array, "*shape"] | None, tile: TileState, settings: LayerSettings
) -> Float[Array, "*shape"] | None:
    """The key bias that attention sees: [layers, B, K, blocks, block], or None."""
    sparse = settings.sparse
    if key_bias is None or sparse.dense_key_bias:
        return key_bias
    # Parity with the reference, which drops c wherever attention is dense (§8.6).
    if settings.selector.dense:
        return None
    if sparse.dense_len > 0:
        dense = tile.length < sparse.dense_len
        key_bias = jnp.where(dense[None, :, None, None, None], 0.0, key_bias)
    return key_bias


def decode_attention(
    q: Float[Array, "B 1 N H"],
    kv: Float[Array, "layers B K C block 2 H"],
    slots: Int[Array, "B K P"] | None,
    blocks: Int[Array, "B K P"] | None,
    key_bias: Float[Array, "layers B K C block"] | None,
    layer: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
) -> Float[Array, "B 1 N H"]:
    """One token's attention over slots.

    Args:
      q: Queries after RoPE.
      kv: Slots of one layer or of all of them.
      slots: The slots to read; None reads all of them, in their order.
      blocks: The blocks that lie in them; None with `slots`.
      key_bias: Additive bias of the keys in the slots, or None.
      layer: Index on the leading axis.
      tile: The step.
      settings: Block size and kernels.
    """
    lengths = None
    if blocks is not None:
        # Only a row's last block can be partly filled.
        size = settings.sparse.block_size
        lengths = jnp.clip(tile.length[:, None, None] - blocks * size, 0, size)
    out = paged_decode_attention(
        q[:, 0],
        kv,
        slots=slots,
        slot_lengths=lengths,
        lengths=tile.length if slots is None else None,
        layer=layer,
        key_bias=key_bias,
        implementation=settings.implementation,
    )
    return out[:, None]
