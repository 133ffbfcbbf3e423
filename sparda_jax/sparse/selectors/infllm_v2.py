"""InfLLM-V2: the query's own softmax scores over key means (docs/algorithm.md §2)."""

import dataclasses

from sparda_jax.config import ModelConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_means import KeyMeans
from sparda_jax.sparse.own_query import OwnQuerySelector


@dataclasses.dataclass(frozen=True)
class InfLLMV2(OwnQuerySelector):
    """The layer's own queries choose, in one stage for every model."""

    name = "infllm_v2"
    summary = "the query's own softmax scores over key means"

    def indices(self, config: ModelConfig) -> Indices:
        """Key means."""
        return {"key_means": KeyMeans()}


SELECTOR = InfLLMV2()
