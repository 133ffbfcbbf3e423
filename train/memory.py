"""What training heads needs of a device's memory, before anything is loaded."""

import dataclasses

import jax
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
# Layers that are being read while weights are loaded (`models.weights`).
_LAYERS_READ = 5
# Python, JAX, programs, a tokenizer, texts and what no part names, as measured.
_PROCESS = 1_100_000_000


def training_memory(
    config: ModelConfig, dtype: DTypeLike, tokens: int, *, on_host: bool = False
) -> dict[str, int]:
    """Bytes by part, where `adapt` holds most: loading, regression or training.

    Args:
      config: The model, with as many Forecast queries as are to be trained.
      dtype: Of the frozen weights.
      tokens: Of a row, of which one is in work at a time.
      on_host: The device's memory is the host's (a CPU): what a GPU leaves to the host
        counts as well.
    """
    size, layers = jnp.dtype(dtype).itemsize, config.num_layers
    heads, hidden = num_forecast_parameters(config), config.hidden_size
    queries = config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    square, product = layers * hidden * hidden, layers * hidden * queries
    whole = num_parameters(config)
    # The output head is dropped behind loading.
    head = 0 if config.tie_embeddings else config.vocab_size * hidden
    # Hidden states and the layer's input before and after, q, k, v and what attention
    # gives; then the MLP of some rows.
    states = tokens * (4 * hidden + 3 * queries + 2 * kv)
    mlp = min(tokens, _MLP_ROWS) * 3 * config.ffn_size
    row = {
        "weights": (whole - head) * size,
        "states of a row": states * size,
        "the MLP": mlp * size,
        "scores of a tile": 4 * tile_bytes(),
    }
    regression = row | {
        "heads": 4 * heads,
        # The sums, in float64, are the host's.
        "second moments": (square + product) * (12 if on_host else 4),
    }
    training = row | {
        "heads and their optimizer": 12 * heads,
        "gradients": 8 * heads,
    }
    if not on_host:
        return max(regression, training, key=lambda parts: sum(parts.values()))
    row = {"the process": _PROCESS}
    regression |= row
    training |= row | {
        "a checkpoint that is written": 12 * heads,
        "second moments of inputs": 8 * square,
    }
    a_layer = (whole - head - config.vocab_size * hidden) // layers
    reading = 4 * _LAYERS_READ * a_layer
    loading = row | {"weights": whole * size, "layers being read": reading}
    return max(loading, regression, training, key=lambda parts: sum(parts.values()))


def refuse_too_little_memory(
    config: ModelConfig, dtype: DTypeLike, tokens: int
) -> None:
    """Raises ConfigError, with the figures and the ways out, if it cannot fit."""
    on_host = jax.default_backend() == "cpu"
    parts = training_memory(config, dtype, tokens, on_host=on_host)
    limits = memory_limits(CacheConfig())
    limit = limits.device or limits.both
    total = sum(parts.values())
    if limit is None or total <= limit.size:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    ways = [f"seq_len below {tokens:,}"]
    if jnp.dtype(dtype).itemsize > 2:
        half = training_memory(config, "bfloat16", tokens, on_host=on_host)
        ways.append(f"dtype='bfloat16' ({size_text(sum(half.values()))})")
    if config.forecast_queries > 1:
        one = dataclasses.replace(config, forecast_queries=1)
        less = sum(training_memory(one, dtype, tokens, on_host=on_host).values())
        ways.insert(0, f"queries=1 ({size_text(less)})")
    raise ConfigError(
        f"model={config.name!r} needs about {size_text(total)} to be adapted "
        f"({', '.join(f'{name} {size_text(part)}' for name, part in largest)}), and "
        f"{limit} is what there is; ways out: {', '.join(ways)}"
    )
