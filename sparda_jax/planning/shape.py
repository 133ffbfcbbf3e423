"""The shape of a model by its name, for plans: no weights are read."""

from sparda_jax.checkpoint.source import read_shape
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.models.presets import PRESETS, default_sparse


def named_shape(model: str) -> tuple[ModelConfig, SparseConfig]:
    """Shape and block selection of a preset, a file, a directory or a hub id.

    Of a directory and of a hub id the config.json is enough.

    Raises:
      ConfigError: If it is none of them, and no name of a preset.
      CheckpointError: If a file is damaged or of an unsupported kind.
    """
    if model in PRESETS:
        return PRESETS[model].model, PRESETS[model].sparse
    found = read_shape(model)
    if found is None:
        raise ConfigError(
            f"model={model!r} is not allowed: it must be one of {', '.join(PRESETS)}, "
            "a GGUF file, a directory with a config.json, or a hub id 'org/name'"
        )
    config, sparse = found
    return config, sparse or default_sparse(config)
