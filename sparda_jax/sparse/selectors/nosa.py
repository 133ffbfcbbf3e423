"""NOSA: InfLLM-V2's scores, then a query-agnostic importance (docs/algorithm.md §3)."""

import dataclasses

from sparda_jax.checks import ConfigError
from sparda_jax.config import ModelConfig
from sparda_jax.sparse.own_query import OwnQuerySelector


@dataclasses.dataclass(frozen=True)
class Nosa(OwnQuerySelector):
    """Needs a model with a value-derived key bias."""

    name = "nosa"
    summary = "InfLLM-V2 scores, then NOSA's query-agnostic importance"

    def check(self, config: ModelConfig, *, has_forecast: bool) -> None:
        """Raises ConfigError for a model without a key bias."""
        if not config.key_bias:
            raise ConfigError(
                f"attention={self.name!r} is not allowed for model {config.name!r}: it "
                "needs a model with a value-derived key bias (NOSA); every other "
                "attention runs this one"
            )


SELECTOR = Nosa()
