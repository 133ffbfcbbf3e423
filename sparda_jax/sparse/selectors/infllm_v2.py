"""InfLLM-V2: the query's own softmax scores over key means (specification §2)."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.block_scores import score_by_own_query
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_means import KeyMeans
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class InfLLMV2(Selector):
    """The layer's own queries choose."""

    name = "infllm_v2"
    summary = "the query's own softmax scores over key means"
    scores_all_windows = False

    def indices(self, config: ModelConfig) -> Indices:
        """Key means."""
        return {"key_means": KeyMeans()}

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        return score_by_own_query(tile, sparse, implementation)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """All query heads."""
        return config.num_heads


SELECTOR = InfLLMV2()
