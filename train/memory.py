"""What training heads needs of a device's memory, before anything is loaded."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from sparda_jax.config import CacheConfig, ConfigError, ModelConfig
from sparda_jax.machine import size_text
from sparda_jax.models.spec import (
    num_forecast_parameters,
    num_parameters,
)
from sparda_jax.planning.limits import memory_limits
from train.tiles import tile_bytes

# Rows that pass through the MLP together (`train.backbone`).
_MLP_ROWS = 4096


def training_memory(
    config: ModelConfig, dtype: DTypeLike, tokens: int
) -> dict[str, int]:
    """Bytes by part of regression and training, one row at a time.

    Args:
      config: The model, with as many Forecast queries as are to be trained.
      dtype: Of the frozen weights.
      tokens: Of a row.
    """
    size = jnp.dtype(dtype).itemsize
    heads = num_forecast_parameters(config)
    queries = config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    moments = config.hidden_size * (config.hidden_size + queries)
    # Hidden states and the layer's input before and after, q, k, v and what attention
    # gives; then the MLP of some rows.
    states = tokens * (4 * config.hidden_size + 3 * queries + 2 * kv)
    mlp = min(tokens, _MLP_ROWS) * 3 * config.ffn_size
    return {
        "weights": num_parameters(config) * size,
        "heads and their optimizer": 3 * heads * 4,
        # One after the other; the sums of the second moments are the host's.
        "second moments, or gradients": 4 * max(heads, config.num_layers * moments),
        "states of a row": states * size,
        "the MLP": mlp * size,
        "scores of a tile": 4 * tile_bytes(),
    }


def refuse_too_little_memory(
    config: ModelConfig, dtype: DTypeLike, tokens: int
) -> None:
    """Raises ConfigError, with the figures and the ways out, if it cannot fit."""
    parts = training_memory(config, dtype, tokens)
    limits = memory_limits(CacheConfig())
    limit = limits.device or limits.both
    total = sum(parts.values())
    if limit is None or total <= limit.size:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    ways = [f"seq_len below {tokens:,}", "dtype='bfloat16'"]
    if config.forecast_queries > 1:
        one = dataclasses.replace(config, forecast_queries=1)
        less = sum(training_memory(one, dtype, tokens).values())
        ways.insert(0, f"queries=1 ({size_text(less)})")
    raise ConfigError(
        f"model={config.name!r} needs about {size_text(total)} to be adapted "
        f"({', '.join(f'{name} {size_text(part)}' for name, part in largest)}), and "
        f"{limit} is what there is; ways out: {', '.join(ways)}"
    )
