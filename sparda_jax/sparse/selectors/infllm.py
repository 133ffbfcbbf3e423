"""InfLLM-style: a block is stood for by the keys that its neighbours attended to most.

Source: context_manager.py of thunlp/InfLLM, whose code takes the mean of a block's
representative keys (its text describes sums over them). What differs here: votes and
lists belong to a kv head's group (published: one list for all heads), the local window
is that of the forced blocks, and every token chooses for itself (published: a chunk's
mean query).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.checks import integer, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.representatives import Representatives
from sparda_jax.sparse.own_query import QuerySelector
from sparda_jax.sparse.selection import SelectionTile


@dataclasses.dataclass(frozen=True)
class InfLLM(QuerySelector):
    """The sum of a group's queries against one mean key a block.

    Attributes:
      tokens: Keys that a block's representative is the mean of.
    """

    tokens: int = 4

    name = "infllm"
    title = "InfLLM-style"
    summary = "InfLLM-style: a block's most attended keys, averaged, stand for it"

    def __post_init__(self) -> None:
        settle(self, tokens=integer(1, 1024))

    def indices(self, config: ModelConfig) -> Indices:
        """Representatives, and what they are made of."""
        return {"representatives": Representatives(self.tokens)}

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """As `QuerySelector.score_by`."""
        batch, steps, heads, dim = q.shape
        means = tile.index["representatives"].means
        kv_heads = means.shape[1]
        q = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim).sum(3)
        return jnp.einsum(
            "btkh,bkmh->bktm",
            q,
            means.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """One."""
        return 1


SELECTOR = InfLLM()
