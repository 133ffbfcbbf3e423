"""SparDA whose forecasts are scored by extreme keys (Quest's bound), not by key means.

A mean of 32 keys hides the one key that an answer needs; the extremes of a page of 16
(Quest's published size) keep it, at twice the memory of those means. The Forecast heads
are those of `sparda`: what they make are queries. One a kv head ranks pages by its
bounds alone; several are scored as own queries are (`infllm_v2_bounds`). This pair is
ours, of neither publication.
"""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import integer, optional, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.bound_scores import bound_scores
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_bounds import pages_per_block
from sparda_jax.sparse.own_query import with_importance
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors.infllm_v2_bounds import InfLLMV2Bounds
from sparda_jax.sparse.selectors.sparda import SparDA


@dataclasses.dataclass(frozen=True)
class _ByOwnQuery(InfLLMV2Bounds):
    """What the layers' own queries choose, of the same index."""

    name = "sparda_bounds"

    def indices(self, config: ModelConfig) -> Indices:
        """As there, and what NOSA's second stage needs where the model has it."""
        return with_importance(config, super().indices(config))


@dataclasses.dataclass(frozen=True)
class SparDABounds(SparDA):
    """Forecasts, by the bounds of a block's products with them.

    Attributes:
      page: Tokens that share a bound, as `Quest.page`; a smaller block is one page.
    """

    page: int | None = 16

    name = "sparda_bounds"
    summary = "the layer before forecasts the blocks, scored by their extreme keys"
    scores_all_windows = True

    def __post_init__(self) -> None:
        settle(self, page=optional(integer(1)))

    def indices(self, config: ModelConfig) -> Indices:
        """Least and largest key of each page, as by own queries."""
        return self.by_own_query().indices(config)

    def by_own_query(self) -> _ByOwnQuery:
        """The layer's own queries, scored in the same way."""
        return _ByOwnQuery(page=self.page)

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        own = sparse.forecast_decode_only and not tile.decoding
        query = tile.q if own else tile.forecast
        assert query is not None
        bounds = tile.index["key_bounds"]
        if query.shape[2] > bounds.shape[1]:
            return self.by_own_query().score_by(query, tile, sparse)
        return bound_scores(query, bounds, tile.num_blocks)

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Two products a page: with its minima, and with its maxima."""
        return 2 * pages_per_block(self.page, sparse)


SELECTOR = SparDABounds()
