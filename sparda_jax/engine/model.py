"""A loaded model: weights, shape and the way to attend."""

import dataclasses

import jax

from pallas_kernels.dispatch import Implementation
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.config import CacheConfig, ModelConfig, SparseConfig
from sparda_jax.inference.generate import tile_tokens
from sparda_jax.inference.layer_store import LayerSettings
from sparda_jax.models.decoder import Decoder
from sparda_jax.sparse.selectors import Selector


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A loaded model with a way to attend; made by `sparda_jax.load`.

    Attributes:
      model: The decoder with its weights.
      config: Its shape.
      sparse: Block selection.
      selector: How blocks are chosen.
      tokenizer: None for models without one.
      fingerprint: Hash of the base weights, which Forecast files name.
      implementation: Attention kernels (see `LayerSettings`).
      cache: Where generation keeps its KV.
    """

    model: Decoder
    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    tokenizer: Tokenizer | None
    fingerprint: str | None
    implementation: Implementation | None = None
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    _compiled: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def settings(self) -> LayerSettings:
        """The trace-time constants."""
        return LayerSettings(
            self.config, self.sparse, self.selector, self.implementation
        )

    @property
    def tile_size(self) -> int:
        """Query tokens per prefill tile on the default device."""
        return tile_tokens(jax.default_backend())
