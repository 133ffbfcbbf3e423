"""MagicPIG-style: blocks whose keys share most hash codes with the query.

A token is sampled where its code equals the query's in at least two of L tables of K
signs (SimHash of the keys less their mean). A block's score is how many of its tokens
the query heads of a group sample. Source: models/attnserver.py of MagicPIG.

What differs here: the best blocks are listed whole, with ordinary softmax, so that the
published estimate, which divides each sampled token's weight by the probability that it
was sampled, is gone (`magicpig_tokens` keeps it); and all layers choose. A prompt
attends densely, as there.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import integer, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.signatures import Signatures, directions, hash_codes
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class MagicPIG(Selector):
    """Locality-sensitive hashing, by block.

    Attributes:
      bits: K, signs of a code; at most 15.
      tables: L, codes of a key.
      seed: Of the random directions.
    """

    bits: int = 10
    tables: int = 150
    seed: int = 0

    name = "magicpig"
    title = "MagicPIG-style"
    summary = "MagicPIG-style: blocks whose keys share most hash codes with the query"
    dense_prefill = True
    every_head_scores = True

    def __post_init__(self) -> None:
        settle(
            self,
            bits=integer(1, 15),
            tables=integer(1, 1024),
            seed=integer(0, 2**32 - 1),
        )

    def indices(self, config: ModelConfig) -> Indices:
        """Codes of all keys."""
        return {"signatures": Signatures(self.bits, self.tables, self.seed)}

    def sampled(self, tile: SelectionTile) -> Bool[Array, "B K G T S"]:
        """Tokens whose code is that of the query in at least two tables."""
        assert tile.q is not None
        batch, steps, heads, dim = tile.q.shape
        codes = tile.index["signatures"].codes
        kv_heads = codes.shape[1]
        planes = directions(dim, self.bits, self.tables, self.seed)
        asked = hash_codes(tile.q, planes, self.bits)  # B T N tables
        asked = asked.reshape(batch, steps, kv_heads, heads // kv_heads, -1)
        asked = jnp.moveaxis(asked, 1, 3)[..., None, :]  # B K G T 1 tables
        equal = asked == codes[:, :, None, None]
        return jnp.sum(equal, axis=-1, dtype=jnp.int32) >= 2

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`."""
        sampled = self.sampled(tile)
        by_block = sampled.reshape(*sampled.shape[:-1], -1, sparse.block_size)
        return jnp.sum(by_block, axis=(2, -1)).astype(jnp.float32)

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Every key."""
        return sparse.block_size

    def prompt_end_bytes(
        self, config: ModelConfig, sparse: SparseConfig, tokens: int
    ) -> int:
        """The codes of all keys once more, and the keys in float32."""
        return config.num_kv_heads * tokens * (2 * self.tables + 4 * config.head_dim)


SELECTOR = MagicPIG()
