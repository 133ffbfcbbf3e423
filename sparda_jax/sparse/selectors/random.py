"""Blocks at random beside the forced ones: what a selector must be better than."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import integer, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class Random(Selector):
    """Draws anew for every position and kv head, the same in every row and layer.

    Attributes:
      seed: Another one gives other blocks.
    """

    seed: int = 0

    name = "random"
    summary = "blocks at random beside the forced ones (seeded)"
    looks_ahead = True
    scores_all_windows = False
    divides_heads = False

    def __post_init__(self) -> None:
        settle(self, seed=integer(0, 2**32 - 1))

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`: a hash of seed, head, position and block."""
        head = jnp.arange(config.num_kv_heads, dtype=jnp.uint32)[None, :, None, None]
        position = tile.positions.astype(jnp.uint32)[:, None, :, None]
        x = jnp.arange(tile.num_blocks, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        for word in (position, head, jnp.uint32(self.seed)):
            x = (x ^ (word + jnp.uint32(0x7F4A7C15))) * jnp.uint32(0x85EBCA6B)
            x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
            x = x ^ (x >> 16)
        return x.astype(jnp.float32)

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """None."""
        return 0


SELECTOR = Random()
