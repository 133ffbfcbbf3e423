"""The protocol of selectors: how a query row's KV blocks are chosen.

A selector is a frozen value without state, so that it can be a static argument of a
jitted function. It says which index it keeps of a layer's keys, which query it scores
with, and scores blocks. What is common to all stands here and in `selection`: forced
blocks, the future, the budget, NOSA's second stage and the choice of the best.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import ConfigError
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.rope import RopeCosSin
from sparda_jax.sparse.index import Indices
from sparda_jax.sparse.selection import (
    SelectionTile,
    budget_width,
    constrain_by_importance,
    force_blocks,
    top_blocks,
)


@dataclasses.dataclass(frozen=True)
class Selector:
    """One way to choose blocks. A subclass says at least its name and `score`.

    Attributes:
      name: As users write it.
      title: As reports write it, 'X-style' for a method that does not choose blocks
        where it comes from; empty for the name.
      summary: One line for help texts.
      dense: Attends to everything; nothing is scored.
      dense_prefill: Prompts attend to everything: blocks are chosen in decode alone.
      looks_ahead: Chooses without the layer's own queries, so that the layer before can
        choose for it and start its fetch.
      hands_on_scores: What travels to the next layer are the block scores of
        `by_own_query`, no query.
      attends_tokens: Decode attends to single tokens with corrected logits
        (`token_correction`), in plain jax.numpy: a form for evaluation. It lists no
        blocks (`dense`), so that an offloaded cache has a slot for each.
      evicts: Earlier blocks that it does not list for a prompt's last token it lists
        for no later one: a cache may give their memory back (`kind="evict"`).
      needs_forecast: The model must have Forecast heads.
      scores_all_windows: Prefill holds the scores of all windows of a tile; else they
        go through `pallas_kernels.block_scores` (for the planner).
      divides_heads: What a kv head chooses does not depend on its number or on other
        heads, so that devices may divide them.
      every_head_scores: Scores are computed by every query head, not by one a kv head
        (for the planner).
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    dense: ClassVar[bool] = False
    dense_prefill: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    hands_on_scores: ClassVar[bool] = False
    attends_tokens: ClassVar[bool] = False
    evicts: ClassVar[bool] = False
    needs_forecast: ClassVar[bool] = False
    scores_all_windows: ClassVar[bool] = True
    divides_heads: ClassVar[bool] = True
    every_head_scores: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What to call it in a report."""
        return self.title or self.name

    def check(self, config: ModelConfig, *, has_forecast: bool) -> None:
        """Raises ConfigError if the model cannot be used with this selector."""
        if self.needs_forecast and not has_forecast:
            raise ConfigError(
                f"attention={self.name!r} needs Forecast weights, and none are loaded "
                f"for model {config.name!r}. Two ways out: forecast=PATH, a Forecast "
                "weights file trained for this model, or forecast='from_query', the "
                "training-free heads (mean of the next layer's query heads in each "
                "group)"
            )

    def indices(self, config: ModelConfig) -> Indices:
        """The parts of the index that it keeps of a layer's keys, by name."""
        del config
        return {}

    def next_query_weights(
        self, model: Decoder, layer: int | Int[Array, ""]
    ) -> Any | None:
        """Weights of the query that layer `layer` (mod L) is scored with.

        The layer before makes that query, and layer 0 its own; None where a layer's own
        queries score, or none do.
        """
        del model, layer

    def next_query(
        self, weights: Any, x: Float[Array, "B T D"], rope_cos_sin: RopeCosSin
    ) -> Float[Array, "B T heads H"]:
        """The query made of a layer's normalised input, to score the next layer by.

        Or of what its MLP reads (`asks_late`); layer 0's own is of its input.
        """
        raise NotImplementedError

    def asks_late(self, config: ModelConfig) -> bool:
        """Whether `next_query` reads what the layer's MLP reads, not the layer's input.

        It knows this layer's attention then, and the next layer's fetch starts behind
        it, beside the MLP alone.
        """
        del config
        return False

    def by_own_query(self) -> "Selector":
        """The same selector, with the same index, by the layer's own queries.

        It has the last word where a choice made ahead is verified.
        """
        return self

    def budget(self, sparse: SparseConfig) -> int:
        """Blocks that a token of any layer attends to at most, forced ones included."""
        return sparse.largest_budget

    def score(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> Float[Array, "B K T M"]:
        """Scores of all blocks; −∞ where a block is not to be chosen."""
        raise NotImplementedError

    def token_correction(
        self, tile: SelectionTile, keys: Float[Array, "B K S H"], config: ModelConfig
    ) -> Float[Array, "B K G T S"]:
        """What `attends_tokens` adds to each logit; −∞ for a token left out.

        Args:
          tile: The step.
          keys: All keys of the layer.
          config: The model.
        """
        raise NotImplementedError

    def importance(
        self, tile: SelectionTile, config: ModelConfig, sparse: SparseConfig
    ) -> Float[Array, "B K W"] | None:
        """Window scores of NOSA's query-agnostic second stage; None for none.

        There is one where the index keeps an importance.
        """
        del config, sparse
        return tile.importance

    def scored_heads(
        self, config: ModelConfig, sparse: SparseConfig, *, decoding: bool
    ) -> int:
        """Heads whose scores are computed, for the planner."""
        del sparse, decoding
        return config.num_heads if self.every_head_scores else config.num_kv_heads

    def scores_per_block(self, sparse: SparseConfig) -> int:
        """Scores that a head computes of one block, for the planner."""
        return sparse.windows_per_block

    def scores_held(self, sparse: SparseConfig) -> int:
        """Of them, how many a prefill tile holds at a time, for the planner."""
        return self.scores_per_block(sparse)

    def prompt_end_bytes(
        self, config: ModelConfig, sparse: SparseConfig, tokens: int
    ) -> int:
        """Bytes of a row that `IndexPart.end_prefill` needs, for the planner.

        Args:
          config: The model.
          sparse: Selection geometry.
          tokens: Tokens of room in the row.
        """
        del config, sparse, tokens
        return 0

    def ahead_bytes(self, config: ModelConfig, num_blocks: int, itemsize: int) -> int:
        """Bytes a prompt token of what travels to the next layer, for the planner."""
        if self.hands_on_scores:
            return config.num_kv_heads * num_blocks * 4
        if self.dense_prefill or not self.needs_forecast:
            return 0
        queries = config.num_kv_heads * config.forecast_queries
        return queries * config.head_dim * itemsize

    def lists_blocks(
        self, num_blocks: int, sparse: SparseConfig, *, decoding: bool = True
    ) -> bool:
        """Whether `select` makes lists for a cache of that many blocks.

        It does not where a list would hold every block, so that short contexts cost no
        scoring.
        """
        if self.dense or (self.dense_prefill and not decoding):
            return False
        return num_blocks > min(self.budget(sparse), sparse.smallest_budget)

    def list_width(self, num_blocks: int, sparse: SparseConfig) -> int:
        """Blocks that a token attends to at most in a cache of that many blocks."""
        if self.dense:
            return num_blocks
        return budget_width(self._within_budget(sparse), num_blocks)

    def select(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None = None,
    ) -> Int[Array, "B K T P"] | None:
        """Block lists of the tile's rows, −1 padded; None for all causal blocks.

        Args:
          tile: What is to be attended by.
          config: The model.
          sparse: Selection geometry.
          implementation: Kernel of prefill's scores: None takes what is recorded as
            fastest for the device, a name is never replaced by another.
        """
        if not self.lists_blocks(tile.num_blocks, sparse, decoding=tile.decoding):
            return None
        sparse = self._within_budget(sparse)
        own = (tile.positions // sparse.block_size)[:, None]  # B 1 T
        scores, settled = self._scores(tile, config, sparse, implementation)
        return top_blocks(
            scores, own, tile.length, sparse, layer=tile.layer, force=not settled
        )

    def ranking(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B K T M"]:
        """Scores in whose order lists are filled, as `select` fills them.

        Forced blocks have +∞ and future ones −∞; ties go to the lowest block.
        """
        scores, settled = self._scores(tile, config, sparse, implementation)
        own = (tile.positions // sparse.block_size)[:, None]  # B 1 T
        return scores if settled else force_blocks(scores, own, sparse)

    def _scores(
        self,
        tile: SelectionTile,
        config: ModelConfig,
        sparse: SparseConfig,
        implementation: Implementation | None,
    ) -> tuple[Float[Array, "B K T M"], bool]:
        """Block scores, and whether forced and future blocks are settled in them."""
        own = (tile.positions // sparse.block_size)[:, None]  # B 1 T
        # Whoever scored: forced blocks come first, and scores that overflow or are no
        # numbers push none of them out.
        scores = self.score(tile, config, sparse, implementation)
        importance = self.importance(tile, config, sparse)
        length, layer = tile.length, tile.layer
        if importance is None:
            return scores, False
        window = jnp.arange(importance.shape[-1])
        last = window * sparse.kernel_stride + sparse.kernel_size
        finished = (last <= length[:, None])[:, None]
        importance = jnp.where(finished, importance, -jnp.inf)
        scores = force_blocks(scores, own, sparse)
        scores = constrain_by_importance(scores, importance, own, sparse, layer=layer)
        return scores, True

    def _within_budget(self, sparse: SparseConfig) -> SparseConfig:
        budget = self.budget(sparse)
        if budget == sparse.largest_budget:
            return sparse
        return dataclasses.replace(sparse, block_budget=budget)
