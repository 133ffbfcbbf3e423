"""The oracle: the blocks that hold most of the true attention, after looking at it all.

No selector captures more attention with as many blocks. It reads every key, so it
saves nothing: it is what others are measured by.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.all_keys import AllKeys, Keys
from sparda_jax.sparse.own_query import QuerySelector
from sparda_jax.sparse.selection import SelectionTile

# Blocks whose logits a prefill tile holds at a time, at most: of a small one, a large.
_CHUNK, _FEW = 16, 4
_SMALL_TILE = 256


def attention_mass(
    q: Float[Array, "B T N H"],
    keys: Keys,
    positions: Int[Array, "B T"],
    block_size: int,
) -> Float[Array, "B K T M"]:
    """Share of each token's causal attention that a block holds, summed over a group.

    Args:
      q: Queries after RoPE.
      keys: Keys of one layer [B, K, S, H].
      positions: Of the queries.
      block_size: Tokens of a block; S is a multiple.

    Returns:
      Float32 masses; those of a token's row sum to G.
    """
    batch, steps, heads, dim = q.shape
    kv_heads, tokens = keys.k.shape[1:3]
    blocks = tokens // block_size
    q = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    size = math.gcd(blocks, _CHUNK if steps <= _SMALL_TILE else _FEW)
    size = blocks if steps == 1 else size
    span = size * block_size

    def chunk(number: Int[Array, ""]) -> tuple[Array, Array]:
        """Largest logit and sum of weights of each block: [B, K, G, T, size]."""
        first = number * span
        k = jax.lax.dynamic_slice_in_dim(keys.k, first, span, axis=2)
        logits = jnp.einsum(
            "btkgh,bksh->bkgts",
            q,
            k.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = logits * dim**-0.5
        if keys.bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(keys.bias, first, span, axis=2)
            logits = logits + bias[:, :, None, None]
        past = first + jnp.arange(span) <= positions[..., None]  # B T span
        logits = jnp.where(past[:, None, None], logits, -jnp.inf)
        logits = logits.reshape(*logits.shape[:-1], size, block_size)
        peak = jnp.max(logits, axis=-1)
        shift = jnp.where(jnp.isfinite(peak), peak, 0.0)
        return peak, jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1)

    def unread(number: Int[Array, ""]) -> tuple[Array, Array]:
        """What `chunk` gives of keys that all come after all queries."""
        del number
        shape = (batch, kv_heads, heads // kv_heads, steps, size)
        nothing = jnp.zeros(shape, jnp.float32)
        return nothing - jnp.inf, nothing

    latest = jnp.max(positions)
    peaks, totals = jax.lax.map(
        lambda n: jax.lax.cond(n * span <= latest, chunk, unread, n),
        jnp.arange(blocks // size),
    )
    peaks, totals = (
        jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], blocks) for x in (peaks, totals)
    )
    top = jnp.max(peaks, axis=-1, keepdims=True)
    weights = jnp.where(totals > 0, totals * jnp.exp(peaks - top), 0.0)
    return jnp.sum(weights / jnp.sum(weights, axis=-1, keepdims=True), axis=2)


@dataclasses.dataclass(frozen=True)
class Oracle(QuerySelector):
    """Ranks blocks by the attention that the layer's own queries pay to them."""

    name = "oracle"
    summary = "the blocks that hold most of the true attention (reads every key)"
    every_head_scores = True

    def indices(self, config: ModelConfig) -> Indices:
        """Every key."""
        return {"all_keys": AllKeys(biased=config.key_bias)}

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """As `QuerySelector.score_by`."""
        keys = tile.index["all_keys"]
        return attention_mass(q, keys, tile.positions, sparse.block_size)

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Every key."""
        return sparse.block_size

    def scores_held(self, sparse: SparseConfig) -> int:
        """A chunk's logits beside two numbers a block."""
        return 8


SELECTOR = Oracle()
