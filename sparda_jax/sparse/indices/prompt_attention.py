"""SnapKV's look back: what a prompt's last queries attend to, block by block."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens, PromptEnd
from sparda_jax.sparse.indices.query_window import (
    append_queries,
    empty_window,
    window_positions,
)
from sparda_jax.sparse.masked import masked_softmax


class PromptState(NamedTuple):
    """What is kept of a layer.

    Attributes:
      queries: The last queries [layers, B, w, N, H].
      scores: Attention of the prompt's last queries to each block that came before
        them [layers, B, K, M], float32.
      kept_from: The block in which those queries begin [layers, B]: it and all later
        ones are kept whatever they score.
    """

    queries: Float[Array, "layers B w N H"]
    scores: Float[Array, "layers B K M"]
    kept_from: Int[Array, "layers B"]


def look_back(
    q: Float[Array, "B w N H"],
    k: Float[Array, "B K S H"],
    positions: Int[Array, "B w"],
    seen: Bool[Array, "B w"],
    first: Int[Array, " B"],
    pool: int,
) -> Float[Array, "B K S"]:
    """Pooled attention of the last queries to each token before `first`.

    Softmax over the past of each query, summed over the queries, cut off at `first`,
    averaged over `pool` neighbours (zeros beyond the ends) and over the group.
    """
    batch, _, heads, dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    q = q.astype(jnp.float32).reshape(batch, -1, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bwkgh,bksh->bkgws", q, k.astype(jnp.float32)) * dim**-0.5
    token = jnp.arange(tokens)
    past = (token <= positions[..., None]) & seen[..., None]  # B w S
    logits = jnp.where(past[:, None, None], logits, -jnp.inf)
    votes = jnp.sum(masked_softmax(logits), axis=3).mean(2)
    before = token < first[:, None, None]
    votes = jnp.where(before, votes, 0.0)
    side = pool // 2
    padded = jnp.pad(votes, ((0, 0), (0, 0), (side, side)))
    summed = sum(padded[..., i : i + tokens] for i in range(pool))
    return jnp.where(before, summed / pool, 0.0)


@dataclasses.dataclass(frozen=True)
class PromptAttention(IndexPart):
    """Settled at a prompt's end and frozen until the next one's.

    Attributes:
      heads: N.
      window: w, queries that vote.
      pool: Neighbouring tokens that share their votes; odd.
    """

    heads: int
    window: int
    pool: int

    def init(self, shape: IndexShape, sparse: SparseConfig) -> PromptState:
        """As `IndexPart.init`."""
        layers, batch = shape.layers, shape.batch
        return PromptState(
            queries=empty_window(
                layers, batch, self.window, self.heads, shape.head_dim, shape.dtype
            ),
            scores=jnp.zeros((layers, batch, shape.kv_heads, shape.blocks)),
            kept_from=jnp.zeros((layers, batch), jnp.int32),
        )

    def append(
        self, state: PromptState, new: NewTokens, sparse: SparseConfig
    ) -> PromptState:
        """As `IndexPart.append`."""
        return state._replace(queries=append_queries(state.queries, new))

    def end_prefill(
        self,
        state: PromptState,
        layer: int | Int[Array, ""],
        end: PromptEnd,
        *,
        sparse: SparseConfig,
    ) -> PromptState:
        """As `IndexPart.end_prefill`."""
        positions, seen = window_positions(self.window, end.length)
        first = jnp.maximum(end.length - self.window, 0)
        k = end.kv[end.layer, :, :, :, :, 0]  # B K M block H
        blocks = k.shape[2]
        votes = look_back(
            state.queries[layer],
            k.reshape(*k.shape[:2], -1, k.shape[-1]),
            positions,
            seen,
            first,
            self.pool,
        )
        scores = votes.reshape(*votes.shape[:2], blocks, -1).sum(-1)
        ends = end.ends
        scores = jnp.where(ends[:, None, None], scores, state.scores[layer])
        kept = jnp.where(ends, first // sparse.block_size, state.kept_from[layer])
        return state._replace(
            scores=state.scores.at[layer].set(scores),
            kept_from=state.kept_from.at[layer].set(kept),
        )
