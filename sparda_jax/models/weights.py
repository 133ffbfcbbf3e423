"""Hugging Face tensor names ↔ the decoder's fused weights; random weights for tests.

The names are those of the specification, §1.3; linear weights there are [out, in].
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from sparda_jax.checkpoint.layout import base_shapes
from sparda_jax.config import ConfigError, ModelConfig
from sparda_jax.models.decoder import Decoder, DecoderLayer, Storage
from sparda_jax.models.forecast import heads_from_query

Load = Callable[[str], np.ndarray]


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the base model, Forecast heads not counted."""
    return sum(int(np.prod(shape)) for _, shape in base_shapes(config))


def num_forecast_parameters(config: ModelConfig) -> int:
    """Parameters of the Forecast heads: L matrices of [D, K·H]."""
    width = config.num_kv_heads * config.head_dim
    return config.num_layers * config.hidden_size * width


def _layer_weights(
    config: ModelConfig, index: int, load: Load, dtype: DTypeLike
) -> dict[str, Array]:
    layer = f"model.layers.{index}."
    attention = layer + "self_attn."

    def fused(*names: str) -> np.ndarray:
        return np.concatenate([load(name) for name in names], axis=0)

    qkv = [attention + f"{part}_proj" for part in "qkv"]
    mlp = [layer + f"mlp.{part}_proj.weight" for part in ("gate", "up")]
    arrays = {
        "attention_norm": load(layer + "input_layernorm.weight"),
        "qkv": fused(*(name + ".weight" for name in qkv)).T,
        "out": load(attention + "o_proj.weight").T,
        "mlp_norm": load(layer + "post_attention_layernorm.weight"),
        "gate_up": fused(*mlp).T,
        "down": load(layer + "mlp.down_proj.weight").T,
    }
    if config.attention_bias:
        arrays["qkv_bias"] = fused(*(name + ".bias" for name in qkv))
    if config.qk_norm:
        arrays["q_norm"] = load(attention + "q_norm.weight")
        arrays["k_norm"] = load(attention + "k_norm.weight")
    if config.key_bias:
        arrays["key_bias_scale"] = load(attention + "A")
        arrays["key_bias_delta"] = load(attention + "delta.weight").T
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def build_decoder(
    config: ModelConfig,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    dtype: DTypeLike,
    storage: Storage = "per_layer",
    on_layer: Callable[[], None] | None = None,
) -> Decoder:
    """A decoder from checkpoint tensors, without Forecast heads.

    Args:
      config: The model's shape.
      tensors: Loaders by checkpoint name; each is called once, from several threads.
      dtype: Type of the weights.
      storage: One array per layer, or stacked ones.
      on_layer: Called after each layer (progress).

    Raises:
      ConfigError: If a tensor is missing or has another shape; names both shapes.
    """
    shapes = dict(base_shapes(config))

    def load(name: str) -> np.ndarray:
        if name not in tensors:
            raise ConfigError(f"tensor {name!r} is missing from model {config.name!r}")
        array = tensors[name]()
        if tuple(array.shape) != shapes[name]:
            raise ConfigError(
                f"tensor {name!r} has shape {tuple(array.shape)}; model "
                f"{config.name!r} needs {shapes[name]}"
            )
        return array

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(_layer_weights(config, index, load, dtype))

    # Dequantising and transposing are NumPy's work, which leaves Python's lock.
    layers = []
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for ready in pool.map(layer, range(config.num_layers)):
            layers.append(ready)
            if on_layer is not None:
                on_layer()
    head = None
    if not config.tie_embeddings:
        head = jnp.asarray(load("lm_head.weight"), dtype)
    return Decoder(
        config,
        embedding=jnp.asarray(load("model.embed_tokens.weight"), dtype),
        layers=layers,
        final_norm=jnp.asarray(load("model.norm.weight"), dtype),
        head=head,
        storage=storage,
    )


def forecast_heads(
    config: ModelConfig, future: np.ndarray, current: np.ndarray, dtype: DTypeLike
) -> list[Array]:
    """Heads by consuming layer from checkpoint matrices.

    Args:
      config: The model's shape.
      future: q_future_proj of layers 0 … L−2, [L−1, K·H, D].
      current: q_curr_proj of layer 0, [K·H, D].
      dtype: Type of the heads.
    """
    assert future.shape[0] == config.num_layers - 1
    return [jnp.asarray(matrix.T, dtype) for matrix in (current, *future)]


def from_query_heads(model: Decoder) -> list[Array]:
    """Training-free heads of a loaded model (`models.forecast.heads_from_query`)."""
    config = model.config
    heads, dim = config.num_kv_heads, config.head_dim
    return [heads_from_query(query, heads, dim) for query in model.query_weights()]


def random_tensors(
    config: ModelConfig, seed: int, scale: float = 0.02
) -> dict[str, Callable[[], np.ndarray]]:
    """Loaders of random float32 weights, norms near 1 (tests, speed experiments)."""
    shapes = dict(base_shapes(config))

    def make(index: int, name: str) -> np.ndarray:
        rng = np.random.default_rng((seed, index))
        values = rng.standard_normal(shapes[name], dtype=np.float32) * scale
        return values + 1 if name.endswith("norm.weight") else values

    return {
        name: jax.tree_util.Partial(make, index, name)
        for index, name in enumerate(shapes)
    }
