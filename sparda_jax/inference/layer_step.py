"""The layer body: T tokens through one decoder layer. Written once.

A prefill tile (T tokens), a further turn and a decode step (T = 1) all run this
function; so do the scanned and the unrolled loop over layers, and every selector. Its
order is the architecture's: project, forecast for the next layer, append to the cache,
select, attend, MLP.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common.dispatch import Implementation
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from sparda_jax.cache.resident import LayerCache, append_tokens
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.decoder import (
    DecoderLayer,
    project_qkv,
    value_key_bias,
)
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.layers import matmul, rms_norm, swiglu
from sparda_jax.models.rope import Rotation
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors import Selector


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What is fixed at trace time, the same for every layer and step.

    Attributes:
      config: The model.
      sparse: Selection geometry.
      selector: How blocks are chosen.
      implementation: Attention kernels: None takes what is recorded as fastest for the
        device, a name is never replaced by another.
    """

    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    implementation: Implementation | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileState:
    """Where a tile stands in its rows.

    Attributes:
      start: Position of the tile's first token, per row [B].
      count: Valid tokens of the tile, per row [B]; the rest is padding.
      length: Keys of the row once the whole prompt or step is in [B].
      turn: Rotation of the tile's tokens.
      decoding: The tile is one decode step.
    """

    start: Int[Array, " B"]
    count: Int[Array, " B"]
    length: Int[Array, " B"]
    turn: Rotation
    decoding: bool = dataclasses.field(metadata={"static": True})

    def positions(self, steps: int) -> Int[Array, "B T"]:
        """Positions of the tile's tokens."""
        return self.start[:, None] + jnp.arange(steps)


def _attend(
    q: Float[Array, "B T N H"],
    blocks: Int[Array, "B K T P"] | None,
    cache: LayerCache,
    index: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
) -> Float[Array, "B T N H"]:
    """Attention of the tile over its block lists (None: all causal blocks)."""
    sparse = settings.sparse
    key_bias = cache.key_bias
    if key_bias is not None and not sparse.dense_key_bias:
        # Parity with the reference, which drops c wherever attention is dense (§8.6).
        if settings.selector.scores is None:
            key_bias = None
        elif sparse.dense_len > 0:
            dense = tile.length < sparse.dense_len
            key_bias = jnp.where(dense[None, :, None, None, None], 0.0, key_bias)
    if not tile.decoding:
        return block_sparse_attention(
            q,
            cache.kv,
            q_start=tile.start,
            block_indices=blocks,
            layer=index,
            key_bias=key_bias,
            implementation=settings.implementation,
        )
    slots = slot_lengths = None
    if blocks is not None:
        # In a resident cache slot c holds block c; a slot table comes in between when
        # KV is offloaded. Only the row's last block can be partly filled.
        slots = blocks[:, :, 0]
        filled = tile.length[:, None, None] - slots * sparse.block_size
        slot_lengths = jnp.clip(filled, 0, sparse.block_size)
    out = paged_decode_attention(
        q[:, 0],
        cache.kv,
        slots=slots,
        slot_lengths=slot_lengths,
        lengths=tile.length if blocks is None else None,
        layer=index,
        key_bias=key_bias,
        implementation=settings.implementation,
    )
    return out[:, None]


def forecast_for_first_layer(
    h: Float[Array, "B T D"],
    norm: Float[Array, " D"],
    head: Float[Array, "D KH"],
    tile: TileState,
    config: ModelConfig,
) -> Float[Array, "B T K H"]:
    """phi_0, which layer 0 makes of its own input (specification §4.2)."""
    x = rms_norm(h, norm, config.rms_norm_eps)
    return project_forecast(x, head, tile.turn)


class LayerOutput(NamedTuple):
    """What a layer makes of a tile.

    Attributes:
      hidden: Hidden states [B, T, D].
      phi: Forecast for the next layer [B, T, K, H], or None.
      cache: The cache with the tile's tokens.
      blocks: Block lists [B, K, T, P]; None: all causal blocks.
    """

    hidden: Float[Array, "B T D"]
    phi: Float[Array, "B T K H"] | None
    cache: LayerCache
    blocks: Int[Array, "B K T P"] | None


# Jitted for itself, so that an unrolled loop over layers traces and lowers it once.
@functools.partial(jax.jit, static_argnames="settings")
def decoder_layer(
    layer: DecoderLayer,
    next_head: Float[Array, "D KH"] | None,
    h: Float[Array, "B T D"],
    phi: Float[Array, "B T K H"] | None,
    cache: LayerCache,
    index: int | Int[Array, ""],
    tile: TileState,
    settings: LayerSettings,
) -> LayerOutput:
    """Runs one layer on one tile.

    Args:
      layer: The layer's weights.
      next_head: Forecast head that the next layer consumes, or None.
      h: Hidden states.
      phi: Forecasts of the layer before for this layer's selection, or None.
      cache: The cache that holds the layer, before the tile.
      index: The layer's index inside `cache`.
      tile: Where the tile stands.
      settings: The model and how to attend.
    """
    config, sparse = settings.config, settings.sparse
    x = rms_norm(h, layer.attention_norm[...], config.rms_norm_eps)
    q, k, v = project_qkv(layer, config, x, tile.turn)
    phi_next = None
    if next_head is not None:
        phi_next = project_forecast(x, next_head, tile.turn)
    cache = append_tokens(
        cache,
        index,
        k,
        v,
        value_key_bias(layer, v) if config.key_bias else None,
        start=tile.start,
        count=tile.count,
        sparse=sparse,
    )
    importance = cache.importance
    seen = SelectionTile(
        q=q,
        phi=phi,
        positions=tile.positions(h.shape[1]),
        windows=cache.keys.windows[index],
        importance=None if importance is None else importance.windows[index][..., 0],
        length=tile.length,
        decoding=tile.decoding,
    )
    blocks = settings.selector.select(seen, config, sparse)
    attended = _attend(q, blocks, cache, index, tile, settings)
    scale = jnp.asarray(config.residual_scale, h.dtype)
    flat = attended.reshape(*h.shape[:2], -1)
    h = h + scale * matmul(flat, layer.out[...])
    x = rms_norm(h, layer.mlp_norm[...], config.rms_norm_eps)
    h = h + scale * swiglu(x, layer.gate_up[...], layer.down[...])
    return LayerOutput(h, phi_next, cache, blocks)
