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

# A step of the walk over keys has its launches and, on a GPU, waits for the host, so a
# tile takes as many blocks at a time as these bounds allow: logits of a head, and of
# a token as a share of its blocks (`Oracle.scores_held`). A small tile, of a CPU, takes
# what its caches hold.
_LOGITS, _SHARE = 1 << 21, 6
_CHUNK, _FEW = 16, 4
_SMALL_TILE = 256


def _blocks_at_a_time(blocks: int, steps: int, block_size: int) -> int:
    """Blocks of a step of the walk, a divisor of `blocks`: all for a single token."""
    if steps == 1:
        return blocks
    if steps <= _SMALL_TILE:
        return math.gcd(blocks, _CHUNK)
    most = min(_LOGITS // steps, _SHARE * blocks) // block_size
    return math.gcd(blocks, 1 << (max(most, _FEW).bit_length() - 1))


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
    q = jnp.moveaxis(q, 1, 3)  # B K G T H
    size = _blocks_at_a_time(blocks, steps, block_size)
    span = size * block_size

    def chunk(number: int | Int[Array, ""]) -> tuple[Array, Array]:
        """Largest logit and sum of weights of each block: [B, K, G, T, size]."""
        first = number * span
        k = jax.lax.dynamic_slice_in_dim(keys.k, first, span, axis=2)
        logits = jnp.einsum(
            "bkgth,bksh->bkgts",
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

    def put(number: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
        """`found` with a chunk's blocks in their places."""
        place = number * size
        new = chunk(number)
        return (
            jax.lax.dynamic_update_slice_in_dim(found[0], new[0], place, axis=-1),
            jax.lax.dynamic_update_slice_in_dim(found[1], new[1], place, axis=-1),
        )

    if steps == 1:
        peaks, totals = chunk(0)
    else:
        # Keys that come after all queries are not read.
        needed = jnp.clip(jnp.max(positions) // span + 1, 1, blocks // size)
        nothing = jnp.zeros((*q.shape[:-1], blocks), jnp.float32)
        peaks, totals = jax.lax.fori_loop(0, needed, put, (nothing - jnp.inf, nothing))
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
