"""Selectors by name: how a query row's KV blocks are chosen.

A selector turns a `SelectionTile` into block lists. It is a frozen value without state,
so that it can be a static argument of a jitted function. Wherever a selector's name is
taken, a `Selector` of the caller's own is taken as well.
"""

import dataclasses
import types
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from sparda_jax.checks import (
    choice,
    flag,
    function,
    optional,
    settle,
    shown,
    text,
)
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.sparse.block_scores import (
    forecast_block_scores,
    own_query_block_scores,
)
from sparda_jax.sparse.selection import (
    SelectionTile,
    budget_width,
    constrain_by_importance,
    force_blocks,
    forecast_scores,
    own_query_scores,
    pool_to_blocks,
    top_blocks,
)

WindowScores = Callable[[SelectionTile, SparseConfig], Float[Array, "B K T W"]]
BlockScores = Callable[
    [SelectionTile, SparseConfig, Implementation | None], Float[Array, "B K T M"]
]


def _forecast_or_own_query(
    tile: SelectionTile, sparse: SparseConfig
) -> Float[Array, "B K T W"]:
    if sparse.forecast_decode_only and not tile.decoding:
        return own_query_scores(tile, sparse)
    return forecast_scores(tile, sparse)


def _forecast_or_own_query_blocks(
    tile: SelectionTile, sparse: SparseConfig, implementation: Implementation | None
) -> Float[Array, "B K T M"]:
    if sparse.forecast_decode_only:
        return own_query_block_scores(tile, sparse, implementation)
    return forecast_block_scores(tile, sparse, implementation)


@dataclasses.dataclass(frozen=True)
class Selector:
    """One way to choose blocks.

    Attributes:
      name: As users write it.
      scores: Window scores of a tile; None attends to everything.
      needs_forecast: The model must have Forecast heads.
      two_stage: NOSA's query-agnostic second stage follows: "never", "always" (the
        model must have a key bias) or "if_key_bias".
      summary: One line for help texts.
      prefill: Faster form of `scores` for prefill tiles: pooled to blocks and forced.
        The third argument names the kernel, as in `select`. None pools and forces what
        `scores` gives.
    """

    name: str
    scores: WindowScores | None
    summary: str
    needs_forecast: bool = False
    two_stage: str = "never"
    prefill: BlockScores | None = None

    def __post_init__(self) -> None:
        settle(
            self,
            name=text,
            scores=optional(function),
            summary=text,
            needs_forecast=flag,
            two_stage=choice("never", "always", "if_key_bias"),
            prefill=optional(function),
        )

    def check(self, config: ModelConfig, *, has_forecast: bool) -> None:
        """Raises ConfigError if the model cannot be used with this selector."""
        if self.two_stage == "always" and not config.key_bias:
            raise ConfigError(
                f"attention={self.name!r} is not allowed for model {config.name!r}: it "
                "needs a model with a value-derived key bias (NOSA); allowed are "
                f"{', '.join(n for n in selector_names() if n != self.name)}"
            )
        if self.needs_forecast and not has_forecast:
            raise ConfigError(
                f"attention={self.name!r} needs Forecast weights, and none are loaded "
                f"for model {config.name!r}. Two ways out: forecast=PATH, a Forecast "
                "weights file trained for this model, or forecast='from_query', the "
                "training-free heads (mean of the next layer's query heads in each "
                "group)"
            )

    def by_own_query(self) -> "Selector":
        """The same selector with the layer's own queries in place of a forecast."""
        return dataclasses.replace(
            self,
            scores=own_query_scores,
            prefill=own_query_block_scores,
            needs_forecast=False,
        )

    def lists_blocks(self, num_blocks: int, sparse: SparseConfig) -> bool:
        """Whether `select` makes lists for a cache of that many blocks.

        It does not where a list would hold every block, so that short contexts cost no
        scoring.
        """
        return self.scores is not None and num_blocks > sparse.block_budget

    def list_width(self, num_blocks: int, sparse: SparseConfig) -> int:
        """Blocks that a token attends to at most in a cache of that many blocks."""
        if self.scores is None:
            return num_blocks
        return budget_width(sparse, num_blocks)

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
          implementation: Kernel of `prefill`: None takes what is recorded as fastest
            for the device, a name is never replaced by another.
        """
        num_blocks = tile.windows.shape[2] // sparse.windows_per_block
        if self.scores is None or not self.lists_blocks(num_blocks, sparse):
            return None
        own = (tile.positions // sparse.block_size)[:, None]  # B 1 T
        if self.prefill is not None and not tile.decoding:
            blocks = self.prefill(tile, sparse, implementation)
        else:
            window_scores = self.scores(tile, sparse)
            blocks = pool_to_blocks(window_scores, sparse.windows_per_block)
        # Whoever scored: forced blocks come first, and scores that overflow or are no
        # numbers push none of them out.
        blocks = force_blocks(blocks, own, sparse)
        if self.two_stage == "always" or (
            self.two_stage == "if_key_bias" and config.key_bias
        ):
            assert tile.importance is not None
            window = jnp.arange(tile.windows.shape[2])
            last = window * sparse.kernel_stride + sparse.kernel_size
            finished = (last <= tile.length[:, None])[:, None]
            importance = jnp.where(finished, tile.importance, -jnp.inf)
            blocks = constrain_by_importance(blocks, importance, own, sparse)
        return top_blocks(blocks, own, tile.length, sparse)


_BUILT_IN = (
    Selector("dense", None, "full causal attention"),
    Selector(
        "infllm_v2",
        own_query_scores,
        "the query's own softmax scores over key means",
        prefill=own_query_block_scores,
    ),
    Selector(
        "nosa",
        own_query_scores,
        "InfLLM-V2 scores, then NOSA's query-agnostic importance",
        two_stage="always",
        prefill=own_query_block_scores,
    ),
    Selector(
        "sparda",
        _forecast_or_own_query,
        "the layer before forecasts the blocks (NOSA's second stage where it has one)",
        needs_forecast=True,
        two_stage="if_key_bias",
        prefill=_forecast_or_own_query_blocks,
    ),
)
_REGISTRY = types.MappingProxyType({selector.name: selector for selector in _BUILT_IN})


def selector_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_REGISTRY)


def get_selector(name: str | Selector) -> Selector:
    """The selector of that name; a `Selector` is returned as it is.

    Raises:
      ConfigError: If there is none; names what there is.
    """
    if isinstance(name, Selector):
        return name
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(
            f"attention={shown(name)} is not allowed: it must be one of "
            f"{', '.join(selector_names())}"
        )
    return _REGISTRY[name]
