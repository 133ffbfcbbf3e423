"""Hugging Face tensor names ↔ the decoder's fused weights; random weights for tests.

The names are those of the specification, §1.3; linear weights there are [out, in].
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from sparda_jax.config import ConfigError, ModelConfig
from sparda_jax.models.decoder import Decoder, DecoderLayer, Storage
from sparda_jax.models.forecast import heads_from_query

Load = Callable[[str], np.ndarray]

CURRENT_KEY = "model.layers.0.self_attn.q_curr_proj.weight"


def future_key(layer: int) -> str:
    """Checkpoint name of the Forecast that layer `layer` makes for the next one."""
    return f"model.layers.{layer}.self_attn.q_future_proj.weight"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every base tensor of a model and its shape, by checkpoint name."""
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden)
    }
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        attention = layer + "self_attn."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[attention + "q_proj.weight"] = (queries, hidden)
        shapes[attention + "k_proj.weight"] = (keys, hidden)
        shapes[attention + "v_proj.weight"] = (keys, hidden)
        if config.attention_bias:
            shapes[attention + "q_proj.bias"] = (queries,)
            shapes[attention + "k_proj.bias"] = (keys,)
            shapes[attention + "v_proj.bias"] = (keys,)
        if config.qk_norm:
            shapes[attention + "q_norm.weight"] = (dim,)
            shapes[attention + "k_norm.weight"] = (dim,)
        if config.key_bias:
            shapes[attention + "A"] = (config.num_kv_heads,)
            shapes[attention + "delta.weight"] = (config.num_kv_heads, keys)
        shapes[attention + "o_proj.weight"] = (hidden, queries)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the base model, Forecast heads not counted."""
    return sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())


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
      tensors: Loaders by checkpoint name; each is called once.
      dtype: Type of the weights.
      storage: One array per layer, or stacked ones.
      on_layer: Called after each layer (progress).

    Raises:
      ConfigError: If a tensor is missing or has another shape; names both shapes.
    """
    shapes = tensor_shapes(config)

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

    layers = []
    for index in range(config.num_layers):
        layers.append(DecoderLayer(_layer_weights(config, index, load, dtype)))
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
    width = config.num_heads * config.head_dim
    if model.storage == "per_layer":
        queries = [layer.qkv[..., :width][None] for layer in model.layers]
    else:
        queries = list(model.layers.qkv[..., :width][:, None])
    heads, dim = config.num_kv_heads, config.head_dim
    return [heads_from_query(query, heads, dim)[0] for query in queries]


def random_tensors(
    config: ModelConfig, seed: int, scale: float = 0.02
) -> dict[str, Callable[[], np.ndarray]]:
    """Loaders of random float32 weights, norms near 1 (tests, speed experiments)."""
    shapes = tensor_shapes(config)

    def make(index: int, name: str) -> np.ndarray:
        rng = np.random.default_rng((seed, index))
        values = rng.standard_normal(shapes[name], dtype=np.float32) * scale
        return values + 1 if name.endswith("norm.weight") else values

    return {
        name: jax.tree_util.Partial(make, index, name)
        for index, name in enumerate(shapes)
    }
