"""The list of the layer before: what its own queries choose, one layer late.

The plainest way to look ahead, and so what a forecast must be better than. Layer l
scores its own keys as InfLLM-V2 does and hands the scores on; layer l + 1 lists the
best of them. Layer 0 lists its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.block_scores import score_by_own_query
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_means import KeyMeans
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector
from sparda_jax.sparse.selectors.infllm_v2 import InfLLMV2


@dataclasses.dataclass(frozen=True)
class Reuse(Selector):
    """Takes the block scores that the layer before made for itself."""

    name = "reuse"
    summary = "the blocks that the layer before would choose for itself"
    looks_ahead = True
    hands_on_scores = True
    scores_all_windows = False
    every_head_scores = True

    def indices(self, config: ModelConfig) -> Indices:
        """Key means."""
        return {"key_means": KeyMeans()}

    def by_own_query(self) -> Selector:
        """InfLLM-V2: the same index by the layer's own queries."""
        return InfLLMV2()

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        assert tile.forecast is not None
        handed = jnp.swapaxes(tile.forecast, 1, 2)
        if tile.q is None:
            return handed  # chosen one layer ahead: it is not layer 0

        def own() -> Float[Array, "B K T M"]:
            return score_by_own_query(tile, sparse, implementation)

        return jax.lax.cond(tile.layer == 0, own, lambda: handed)


SELECTOR = Reuse()
