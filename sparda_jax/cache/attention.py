"""Attention of one decode step over a layer's slots: what both views share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.sparse.index import IndexState


def attended_bias(
    key_bias: Float[Array, "*shape"] | None, tile: TileState, settings: LayerSettings
) -> Float[Array, "*shape"] | None:
    """The key bias that attention sees: [layers, B, K, blocks, block], or None."""
    sparse = settings.sparse
    if key_bias is None or sparse.dense_key_bias:
        return key_bias
    # The reference drops c wherever attention is dense (docs/algorithm.md §7.4).
    if settings.selector.dense:
        return None
    if sparse.dense_len > 0:
        dense = tile.length < sparse.dense_len
        key_bias = jnp.where(dense[None, :, None, None, None], 0.0, key_bias)
    return key_bias


def token_attention(
    q: Float[Array, "B 1 N H"],
    kv: Float[Array, "layers B K M block 2 H"],
    key_bias: Float[Array, "layers B K M block"] | None,
    index: IndexState,
    layer: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
) -> Float[Array, "B 1 N H"]:
    """Attention to all tokens with the selector's corrections, as it is written down.

    Args:
      q: Queries after RoPE.
      kv: Blocks of one layer or of all of them.
      key_bias: Additive bias of the keys, or None.
      index: The selector's index, of one layer or of all.
      layer: Index on the leading axis.
      tile: The step.
      settings: The model and the selector.
    """
    batch, steps, heads, dim = q.shape
    k, v = (kv[layer, ..., i, :] for i in (0, 1))  # B K M block H
    k, v = (x.reshape(*x.shape[:2], -1, dim).astype(jnp.float32) for x in (k, v))
    kv_heads = k.shape[1]
    seen = tile.selection(index, layer, q=q)
    grouped = q.astype(jnp.float32).reshape(
        batch, steps, kv_heads, heads // kv_heads, dim
    )
    logits = jnp.einsum("btkgh,bksh->bkgts", grouped, k) * dim**-0.5
    logits += settings.selector.token_correction(seen, k, settings.config)
    if key_bias is not None:
        logits += key_bias[layer].reshape(batch, kv_heads, 1, 1, -1)
    past = jnp.arange(k.shape[2]) < tile.length[:, None]  # B S: one token, the last
    logits = jnp.where(past[:, None, None, None], logits, -jnp.inf)
    # What is behind a row's end is garbage, which 0 times may not be 0.
    v = jnp.where(past[:, None, :, None], v, 0.0)
    out = jnp.einsum("bkgts,bksh->btkgh", jax.nn.softmax(logits, axis=-1), v)
    return out.reshape(q.shape).astype(q.dtype)


def decode_attention(
    q: Float[Array, "B 1 N H"],
    kv: Shaped[Array, "layers B K C block 2 H"],
    slots: Int[Array, "B K P"] | None,
    blocks: Int[Array, "B K P"] | None,
    key_bias: Float[Array, "layers B K C block"] | None,
    layer: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
    *,
    scales: Float[Array, "layers B K C S"] | None = None,
    tail: Float[Array, "layers B K block 2 H"] | None = None,
) -> Float[Array, "B 1 N H"]:
    """One token's attention over slots.

    Args:
      q: Queries after RoPE.
      kv: Slots of one layer or of all of them.
      slots: The slots to read; None reads all of them, in their order.
      blocks: The blocks that are in them; None with `slots`.
      key_bias: Additive bias of the keys in the slots, or None.
      layer: Index on the leading axis.
      tile: The step.
      settings: Block size and kernels.
      scales: Of slots in 8 bits.
      tail: The growing blocks beside such slots.
    """
    size = settings.sparse.block_size
    length, grown = tile.length, None
    if tail is not None:
        grown = tile.start % size + tile.count
        length = length - grown  # in slots, whose last one is full
    lengths = None
    if blocks is not None:
        # Only a row's last block can be partly filled.
        lengths = jnp.clip(length[:, None, None] - blocks * size, 0, size)
    out = paged_decode_attention(
        q[:, 0],
        kv,
        slots=slots,
        slot_lengths=lengths,
        lengths=length if slots is None else None,
        layer=layer,
        key_bias=key_bias,
        scales=scales,
        tail=tail,
        tail_lengths=grown,
        implementation=settings.implementation,
    )
    return out[:, None]
