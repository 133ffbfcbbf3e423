"""InfLLM-V2's scores, over extreme keys in the place of key means.

s_j = Σ_g softmax_j(b_{g,j} / √d), where b_{g,j} is the upper bound of head g's product
with any key of page j (`bound_scores`); a block has the score of its best page.
`sparda_bounds` has the same index and scores, by forecasts. The pair is ours, of
neither publication.
"""

import dataclasses

from jaxtyping import Array, Float

from sparda_jax.checks import integer, optional, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.bound_scores import bound_softmax_scores
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_bounds import (
    KeyBounds,
    page_tokens,
    pages_per_block,
)
from sparda_jax.sparse.own_query import QuerySelector
from sparda_jax.sparse.selection import SelectionTile


@dataclasses.dataclass(frozen=True)
class InfLLMV2Bounds(QuerySelector):
    """Own queries' softmax over the bounds of pages, summed over a group.

    Attributes:
      page: Tokens that share a bound, a divisor of a block's; a smaller block is one
        page.
    """

    page: int | None = 16

    name = "infllm_v2_bounds"
    summary = "the query's own softmax scores over extreme keys of pages of 16"
    every_head_scores = True

    def __post_init__(self) -> None:
        settle(self, page=optional(integer(1)))

    def indices(self, config: ModelConfig) -> Indices:
        """Least and largest key of each page."""
        return {"key_bounds": KeyBounds(self.page)}

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """As `QuerySelector.score_by`."""
        return bound_softmax_scores(
            q,
            tile.index["key_bounds"],
            tile.num_blocks,
            positions=tile.positions,
            page=page_tokens(self.page, sparse),
        )

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Two products a page: with its minima, and with its maxima."""
        return 2 * pages_per_block(self.page, sparse)


SELECTOR = InfLLMV2Bounds()
