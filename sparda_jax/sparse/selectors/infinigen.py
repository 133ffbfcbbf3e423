"""InfiniGen-style: the layer before asks with this layer's own W_q, on partial keys.

The next layer's queries are speculated by its projection from this layer's input, and
scored against a part of its keys' channels, in a basis in which that part says most.
Sources: InfiniGen's public code; SparDA's port of it (docs/algorithm.md §4.5), which
knows RoPE and groups as we do.

What differs from them here: blocks of a fixed budget are listed, by their best token
(published: tokens above the largest score less 4, as many as the batch has on average);
a prompt attends densely, as in the first of them; and the channels are each row's and
kv head's own (both take those of the batch's first row).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.checks import integer, number, require, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.query import project_query, query_projection
from sparda_jax.models.rope import RopeCosSin
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.partial_keys import PartialKeys
from sparda_jax.sparse.own_query import QuerySelector
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class InfiniGen(QuerySelector):
    """Speculated queries on partial keys; needs no trained weights.

    Attributes:
      ratio: Share of the channels that are kept, rounded up.
      window: The prompt's last queries, by which they are chosen.
    """

    ratio: float = 0.2
    window: int = 64

    name = "infinigen"
    title = "InfiniGen-style"
    summary = (
        "InfiniGen-style: the next layer's queries, made one layer early, on part of "
        "the channels"
    )
    dense_prefill = True
    looks_ahead = True

    def __post_init__(self) -> None:
        settle(self, ratio=number(above=0), window=integer(1, 4096))
        require(self.ratio <= 1, "InfiniGen.ratio", self.ratio, "at most 1")

    def indices(self, config: ModelConfig) -> Indices:
        """The keys' part."""
        axes = math.ceil(self.ratio * config.head_dim)
        return {"partial_keys": PartialKeys(config.num_heads, self.window, axes)}

    def next_query_weights(
        self, model: Decoder, layer: int | Int[Array, ""]
    ) -> Any | None:
        """The layer's query projection."""
        return query_projection(model, layer)

    def next_query(
        self, weights: Any, x: Float[Array, "B T D"], rope_cos_sin: RopeCosSin
    ) -> Float[Array, "B T heads H"]:
        """The queries that it would make of this layer's input."""
        return project_query(x, weights, rope_cos_sin)

    def by_own_query(self) -> Selector:
        """The layer's real queries on the same partial keys."""
        return _ByOwnQuery(self.ratio, self.window)

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """The best token of each block, by the sum of a group's partial scores."""
        part = tile.index["partial_keys"]
        batch, steps, heads, dim = q.shape
        kv_heads = part.axes.shape[1]
        group = q.astype(jnp.float32).reshape(
            batch, steps, kv_heads, heads // kv_heads, dim
        )
        partial = jnp.einsum("btkh,bkhr->btkr", group.sum(3), part.axes)
        scores = jnp.einsum("btkr,bksr->bkts", partial, part.keys.astype(jnp.float32))
        return scores.reshape(*scores.shape[:3], -1, sparse.block_size).max(-1)

    def prompt_end_bytes(
        self, config: ModelConfig, sparse: SparseConfig, tokens: int
    ) -> int:
        """All keys in float32, and their parts."""
        return 2 * config.num_kv_heads * tokens * config.head_dim * 4

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Every key's part."""
        return sparse.block_size


@dataclasses.dataclass(frozen=True)
class _ByOwnQuery(InfiniGen):
    """What the layers' own queries choose, of the same index."""

    looks_ahead = False

    def next_query_weights(
        self, model: Decoder, layer: int | Int[Array, ""]
    ) -> Any | None:
        """None."""


SELECTOR = InfiniGen()
