"""NOSA: InfLLM-V2's scores, then a query-agnostic importance (specification §3)."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import ConfigError
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.block_scores import score_by_own_query
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.importance import Importance
from sparda_jax.sparse.indices.key_means import KeyMeans
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class Nosa(Selector):
    """Needs a model with a value-derived key bias."""

    name = "nosa"
    summary = "InfLLM-V2 scores, then NOSA's query-agnostic importance"
    scores_all_windows = False

    def check(self, config: ModelConfig, *, has_forecast: bool) -> None:
        """Raises ConfigError for a model without a key bias."""
        if not config.key_bias:
            raise ConfigError(
                f"attention={self.name!r} is not allowed for model {config.name!r}: it "
                "needs a model with a value-derived key bias (NOSA); every other "
                "attention runs this one"
            )

    def indices(self, config: ModelConfig) -> Indices:
        """Key means, and the means of c."""
        return {"key_means": KeyMeans(), "importance": Importance()}

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        return score_by_own_query(tile, sparse, implementation)

    def importance(
        self, tile: SelectionTile, config: ModelConfig, sparse: SparseConfig
    ) -> Float[Array, "B K W"] | None:
        """As `Selector.importance`."""
        return tile.importance

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """All query heads."""
        return config.num_heads


SELECTOR = Nosa()
