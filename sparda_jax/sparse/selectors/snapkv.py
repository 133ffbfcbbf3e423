"""SnapKV-style: what a prompt's last queries attended to, chosen once and for all.

At a prompt's end its last queries vote for earlier tokens; the blocks with most votes
stay, the others are evicted: no later token lists them, so that an offloaded cache
never fetches them. Tokens from the first voting one on are kept. Source:
snapkv_utils.py of FasterDecoding/SnapKV.

What differs here: votes are averaged over a group and summed over a block (published:
single tokens of each query head), and the budget is that of every selector: when the
answer fills it, the blocks with fewest votes go. `CacheConfig(kind="evict")` gives
back the memory of what is evicted, layer by layer, as the prompt leaves a layer. Other
caches keep it, so that a further prompt of a conversation reads all of it, densely as
every prompt does, and votes anew.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import integer, require, settle
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.indices.prompt_attention import PromptAttention
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class SnapKV(Selector):
    """A set of blocks that is fixed at the prompt's end.

    Attributes:
      window: The prompt's last queries, which vote.
      pool: Neighbouring tokens that share their votes; odd.
    """

    window: int = 64
    pool: int = 5

    name = "snapkv"
    title = "SnapKV-style"
    summary = "SnapKV-style: what the prompt's last queries attend to, chosen once"
    dense_prefill = True
    looks_ahead = True
    evicts = True

    def __post_init__(self) -> None:
        settle(self, window=integer(1, 4096), pool=integer(1, 63))
        require(self.pool % 2 == 1, "SnapKV.pool", self.pool, "odd")

    def indices(self, config: ModelConfig) -> Indices:
        """The votes, and the queries that cast them."""
        return {"votes": PromptAttention(config.num_heads, self.window, self.pool)}

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """As `Selector.score`: votes, and above all of them the blocks since then."""
        votes = tile.index["votes"]
        block = jnp.arange(tile.num_blocks)
        # A block's votes are at most one a query.
        since = (self.window + 1 + block).astype(jnp.float32)
        kept = (block >= votes.kept_from[:, None])[:, None]
        scores = jnp.where(kept, since, votes.scores)[:, :, None]
        steps = tile.positions.shape[1]
        return jnp.broadcast_to(scores, (*scores.shape[:2], steps, scores.shape[3]))

    def prompt_end_bytes(
        self, config: ModelConfig, sparse: SparseConfig, tokens: int
    ) -> int:
        """The last queries' logits and weights over all tokens."""
        return 2 * config.num_heads * self.window * tokens * 4

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """None: nothing is scored after the prompt."""
        return 0


SELECTOR = SnapKV()
