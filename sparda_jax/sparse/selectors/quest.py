"""Quest-style: an upper bound of the query's product with any key of a block.

s_j = Σ_i max(q_i · m_{j,i}, q_i · M_{j,i}) with the least and largest key m, M of block
j. Source: evaluation/quest_attention.py of mit-han-lab/quest. What differs here: a page
is a KV block (published: 16 tokens), a list belongs to a group of query heads
(published: to a head), forced blocks are those of every selector, and all layers
choose, in prefill too (published: from the third layer on, and in decode).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import choice, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.key_bounds import KeyBounds
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class Quest(Selector):
    """The bounds of a group's query heads, summed or the largest of them.

    Attributes:
      over_group: `sum`: heads count by how large their bound is. `max`: the best head
        decides.
    """

    over_group: Literal["sum", "max"] = "sum"

    name = "quest"
    title = "Quest-style"
    summary = "Quest-style: upper bounds of a block's scores, from its extreme keys"

    def __post_init__(self) -> None:
        settle(self, over_group=choice("sum", "max"))

    def indices(self, config: ModelConfig) -> Indices:
        """Least and largest key of each block."""
        return {"key_bounds": KeyBounds()}

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`.

        max(q·m, q·M) is q⁺·M + q⁻·m, so that one product serves all channels, and one
        head the whole sum over a group.
        """
        assert tile.q is not None
        batch, steps, heads, dim = tile.q.shape
        kv_heads = config.num_kv_heads
        q = tile.q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
        signed = jnp.stack((jnp.minimum(q, 0), jnp.maximum(q, 0)), axis=-2)
        if self.over_group == "sum":
            signed = jnp.sum(signed, axis=3, keepdims=True)
        bounds = tile.index["key_bounds"]
        # Blocks without keys are not to be chosen; their infinities times 0 are no
        # numbers.
        held = bounds[..., 0, :] <= bounds[..., 1, :]
        bounds = jnp.where(held[..., None, :], bounds, 0).astype(q.dtype)
        scores = jnp.einsum(
            "btkgsh,bkmsh->bkgtm", signed, bounds, preferred_element_type=jnp.float32
        ).max(axis=2)
        return jnp.where(jnp.any(held, -1)[:, :, None], scores, -jnp.inf)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """All query heads for the largest, one a group for the sum."""
        if self.over_group == "max":
            return config.num_heads
        return config.num_kv_heads

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Two products a block: with its minima, and with its maxima."""
        return 2


SELECTOR = Quest()
