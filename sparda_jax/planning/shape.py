"""The shape of a model by its name, for plans: no weights are read."""

import dataclasses

from sparda_jax.checkpoint.forecast import forecast_form
from sparda_jax.checkpoint.source import read_shape
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.forecasts import PUBLISHED
from sparda_jax.models.presets import PRESETS, default_sparse


def named_shape(model: str) -> tuple[ModelConfig, SparseConfig]:
    """Shape and block selection of a preset, a file, a directory or a hub id.

    Of a directory and of a hub id the config.json is enough. A preset whose heads are
    published makes as many queries as these do.

    Raises:
      ConfigError: If it is none of them, and no name of a preset.
      CheckpointError: If a file is damaged or of an unsupported kind.
    """
    if model in PRESETS:
        return _with_published(model), PRESETS[model].sparse
    found = read_shape(model)
    if found is None:
        raise ConfigError(
            f"model={model!r} is not allowed: it must be one of {', '.join(PRESETS)}, "
            "a GGUF file, a directory with a config.json, or a hub id 'org/name'"
        )
    config, sparse = found
    return config, sparse or default_sparse(config)


def _with_published(preset: str) -> ModelConfig:
    """A preset's shape, with what its published heads make and read."""
    config = PRESETS[preset].model
    for published in PUBLISHED.values():
        if published.preset == preset:
            form = forecast_form(published.path)
            return dataclasses.replace(
                config, forecast_queries=form.queries, forecast_reads=form.reads
            )
    return config
