"""A loaded model: weights, shape and the way to attend."""

import dataclasses

import jax

from pallas_kernels.dispatch import IMPLEMENTATIONS, Implementation
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.checkpoint.forecast import GEOMETRY
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import choice, instance, optional, require, settle, text
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig, SparseConfig
from sparda_jax.inference.shapes import tile_tokens
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.sharding import config_of_device
from sparda_jax.sparse.selectors import Selector


def check_same_geometry(trained: SparseConfig, asked: SparseConfig) -> None:
    """Raises ConfigError if Forecast heads do not score the averages that are asked."""
    for field in GEOMETRY:
        made, given = getattr(trained, field), getattr(asked, field)
        if made != given:
            raise ConfigError(
                f"SparseConfig.{field}={given} is not allowed: the Forecast heads were "
                f"trained for {field}={made}; or take forecast='from_query', the "
                "training-free heads, which fit any"
            )


def check_mesh(mesh: MeshConfig, config: ModelConfig, selector: Selector) -> None:
    """Raises ConfigError unless the devices are there and can divide the model."""
    _ = mesh.devices
    if jax.process_count() > 1:
        # Each process reads what all have: rows must not be another host's alone, and
        # no process may be without a device.
        require(
            mesh.data == 1 and mesh.model == jax.device_count(),
            "mesh",
            mesh.text,
            f"data=1,model={jax.device_count()}, all devices of the "
            f"{jax.process_count()} processes",
        )
    config_of_device(config, mesh.model)
    if mesh.model > 1 and not selector.divides_heads:
        raise ConfigError(
            f"mesh model={mesh.model} is not allowed with attention={selector.name!r}: "
            f"what it chooses depends on the head's number; use data={mesh.model}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded model with a way to attend; made by `sparda_jax.load`.

    A value: no call changes it, and `dataclasses.replace` or `with_attention` give
    another one. It checks itself when it is made.

    Attributes:
      model: The decoder with its weights.
      config: Its shape.
      sparse: Block selection.
      selector: How blocks are chosen.
      tokenizer: None for models without one.
      fingerprint: Hash of the base weights, which Forecast files name.
      implementation: Attention kernels (see `LayerSettings`).
      cache: Where generation keeps its KV.
      forecast_sparse: The selection that the Forecast heads were trained for; None
        without heads, and with heads that fit any (training-free) or do not tell.
      tokenizer_error: Why there is no tokenizer although the checkpoint has one.
      mesh: Devices that share it; None for one.

    Raises:
      ConfigError: If the model cannot attend in this way, or its heads were trained
        for another window geometry.
    """

    model: Decoder
    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    tokenizer: Tokenizer | None
    fingerprint: str | None
    implementation: Implementation | None = None
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    forecast_sparse: SparseConfig | None = None
    tokenizer_error: str | None = None
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        settle(
            self,
            model=instance(Decoder),
            config=instance(ModelConfig),
            sparse=instance(SparseConfig),
            selector=instance(Selector),
            tokenizer=optional(instance(Tokenizer)),
            fingerprint=optional(text),
            implementation=optional(choice(*IMPLEMENTATIONS)),
            cache=instance(CacheConfig),
            forecast_sparse=optional(instance(SparseConfig)),
            tokenizer_error=optional(text),
            mesh=optional(instance(MeshConfig)),
        )
        for field, verb in (("forecast_queries", "make"), ("forecast_reads", "do")):
            own, made = getattr(self.config, field), getattr(self.model.config, field)
            require(
                own == made,
                f"LanguageModel.config.{field}",
                own,
                f"{made!r}, as the model's Forecast heads {verb}",
            )
        if self.mesh is not None:
            check_mesh(self.mesh, self.config, self.selector)
        has_forecast = self.model.forecast is not None
        self.selector.check(self.config, has_forecast=has_forecast)
        self.sparse.check_layers(self.config)
        trained = self.forecast_sparse
        if trained is not None and self.selector.needs_forecast:
            # A guess of every head's query is scored as the query is: by any windows.
            if not self.config.guesses_queries:
                check_same_geometry(trained, self.sparse)

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.config.name!r}, attention={self.selector.name!r}, "
            f"{self.model.numbers}, storage={self.model.storage!r}, "
            f"cache={self.cache.kind!r})"
        )

    @property
    def no_tokenizer(self) -> str:
        """What to say where a text is given and there is no tokenizer."""
        why = f" ({self.tokenizer_error})" if self.tokenizer_error else ""
        return f"model {self.config.name!r} has no tokenizer{why}"

    @property
    def settings(self) -> LayerSettings:
        """The trace-time constants, of one device."""
        return LayerSettings(
            config_of_device(self.config, self.parts),
            self.sparse,
            self.selector,
            self.implementation,
            parts=self.parts,
        )

    @property
    def parts(self) -> int:
        """Devices that divide every layer."""
        return 1 if self.mesh is None else self.mesh.model

    @property
    def tile_size(self) -> int:
        """Most query tokens of a prefill tile on the default device."""
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        return tile_tokens(jax.default_backend(), memory)
