"""SparDA: the layer before forecasts the blocks (docs/algorithm.md §4)."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.rope import RopeCosSin
from sparda_jax.sparse.block_scores import score_by_forecast, score_by_own_query
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.own_query import OwnQuerySelector, two_stage_indices
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class _ByOwnQuery(OwnQuerySelector):
    """What the layers' own queries choose, of the same index."""

    name = "sparda"


@dataclasses.dataclass(frozen=True)
class SparDA(Selector):
    """Forecast heads make the query that the next layer's key means are scored with.

    NOSA's second stage follows where the model has a key bias.
    """

    name = "sparda"
    summary = (
        "the layer before forecasts the blocks (NOSA's second stage where it has one)"
    )
    looks_ahead = True
    needs_forecast = True
    scores_all_windows = False

    def indices(self, config: ModelConfig) -> Indices:
        """Key means, and the means of c where the model has it."""
        return two_stage_indices(config)

    def next_query_weights(
        self, model: Decoder, layer: int | Int[Array, ""]
    ) -> Any | None:
        """The Forecast head that the layer consumes."""
        return model.forecast_head(layer)

    def next_query(
        self, weights: Any, x: Float[Array, "B T D"], rope_cos_sin: RopeCosSin
    ) -> Float[Array, "B T heads H"]:
        """The forecast."""
        return project_forecast(x, weights, rope_cos_sin)

    def asks_late(self, config: ModelConfig) -> bool:
        """As the heads were trained."""
        return config.forecast_reads == "attended"

    def by_own_query(self) -> Selector:
        """The layer's own queries in place of the forecast."""
        return _ByOwnQuery()

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        if sparse.forecast_decode_only and not tile.decoding:
            return score_by_own_query(tile, sparse, implementation)
        return score_by_forecast(tile, sparse, implementation)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """Those of the forecast, or all query heads where its own queries prefill."""
        own = sparse.forecast_decode_only and not decoding
        forecast = config.num_kv_heads * config.forecast_queries
        return config.num_heads if own else forecast


SELECTOR = SparDA()
