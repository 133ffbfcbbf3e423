"""What selectors by a layer's own queries share: InfLLM-V2's scores.

With NOSA's second stage where the model has a key bias (docs/algorithm.md §3).

Source: docs/algorithm.md §2.
"""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.block_scores import score_by_own_query
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.importance import Importance
from sparda_jax.sparse.indices.key_means import KeyMeans
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


def with_importance(config: ModelConfig, parts: Indices) -> Indices:
    """These parts, and the means of c where the model has it (NOSA)."""
    return {**parts, "importance": Importance()} if config.key_bias else parts


def two_stage_indices(config: ModelConfig) -> Indices:
    """Key means, and the means of c where the model has it."""
    return with_importance(config, {"key_means": KeyMeans()})


@dataclasses.dataclass(frozen=True)
class QuerySelector(Selector):
    """Queries score blocks by an index: those of `next_query` where it looks ahead."""

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """Scores of all blocks by these queries, as `Selector.score`."""
        raise NotImplementedError

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        del config, implementation
        q = tile.forecast if self.looks_ahead else tile.q
        assert q is not None
        return self.score_by(q, tile, sparse)


@dataclasses.dataclass(frozen=True)
class OwnQuerySelector(Selector):
    """The layer's own queries score the windows. A subclass says its name."""

    scores_all_windows = False
    every_head_scores = True

    def indices(self, config: ModelConfig) -> Indices:
        """As `two_stage_indices`."""
        return two_stage_indices(config)

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        del config
        return score_by_own_query(tile, sparse, implementation)
