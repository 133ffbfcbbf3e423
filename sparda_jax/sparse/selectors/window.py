"""A sliding window: the first blocks and the latest ones, by position alone."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class Window(Selector):
    """Attends to forced blocks only: the least that any selector attends to."""

    name = "window"
    summary = "the first blocks and the latest ones, by position alone"
    looks_ahead = True
    evicts = True
    scores_all_windows = False

    def budget(self, sparse: SparseConfig) -> int:
        """The forced blocks."""
        return sparse.forced_blocks

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`: nothing but forced blocks is to be chosen."""
        shape = (*tile.positions.shape, config.num_kv_heads, tile.num_blocks)
        return jnp.swapaxes(jnp.full(shape, -jnp.inf), 1, 2)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """None."""
        return 0


SELECTOR = Window()
