"""Quest-style: an upper bound of the query's product with any key of a block.

s_j = Σ_i max(q_i · m_{j,i}, q_i · M_{j,i}) with the least and largest key m, M of page
j. Source: evaluation/quest_attention.py of mit-han-lab/quest. What differs here: a page
is a KV block unless said otherwise (published: 16 tokens), a list belongs to a group of
query heads (published: to a head), forced blocks are those of every selector, and all
layers choose, in prefill too (published: from the third layer on, and in decode).
"""

import dataclasses
from typing import Literal

from jaxtyping import Array, Float

from sparda_jax.checks import choice, integer, optional, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.bound_scores import bound_scores
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_bounds import KeyBounds, pages_per_block
from sparda_jax.sparse.own_query import QuerySelector
from sparda_jax.sparse.selection import SelectionTile


@dataclasses.dataclass(frozen=True)
class Quest(QuerySelector):
    """The bounds of a group's query heads, summed or the largest of them.

    Attributes:
      over_group: `sum`: heads count by how large their bound is. `max`: the best head
        decides.
      page: Tokens that share a bound, a divisor of a block's; a block has that of its
        best page. None, or more than a block has: the whole block.
    """

    over_group: Literal["sum", "max"] = "sum"
    page: int | None = None

    name = "quest"
    title = "Quest-style"
    summary = "Quest-style: upper bounds of a block's scores, from its extreme keys"

    def __post_init__(self) -> None:
        settle(self, over_group=choice("sum", "max"), page=optional(integer(1)))

    def indices(self, config: ModelConfig) -> Indices:
        """Least and largest key of each page."""
        return {"key_bounds": KeyBounds(self.page)}

    def score_by(
        self, q: Float[Array, "B T N H"], tile: SelectionTile, sparse: SparseConfig
    ) -> Float[Array, "B K T M"]:
        """As `QuerySelector.score_by`."""
        largest = self.over_group == "max"
        bounds = tile.index["key_bounds"]
        return bound_scores(q, bounds, tile.num_blocks, largest=largest)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """All query heads for the largest, one a group for the sum."""
        if self.over_group == "max":
            return config.num_heads
        return config.num_kv_heads

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Two products a page: with its minima, and with its maxima."""
        return 2 * pages_per_block(self.page, sparse)


SELECTOR = Quest()
