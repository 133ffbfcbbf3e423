"""Golden and random tiny models for the trainer's tests."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.checkpoint.layout import CURRENT, future_name
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import build_decoder, forecast_heads, random_tensors


def _golden_configs(raw: dict) -> tuple[ModelConfig, SparseConfig]:
    sparse, scaling = raw["sparse_config"], raw.get("rope_scaling")
    rope = RopeConfig(theta=raw["rope_theta"])
    if scaling is not None:
        rope = RopeConfig(
            kind="longrope",
            theta=raw["rope_theta"],
            original_max=scaling["original_max_position_embeddings"],
            longrope_max=raw["max_position_embeddings"],
            short_factors=tuple(scaling["short_factor"]),
            long_factors=tuple(scaling["long_factor"]),
        )
    minicpm, layers = raw["model_type"] == "minicpm", raw["num_hidden_layers"]
    divisor = raw["hidden_size"] / raw["dim_model_base"] if minicpm else 1.0
    config = ModelConfig(
        name=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        ffn_size=raw["intermediate_size"],
        num_layers=layers,
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=16,
        max_context=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope=rope,
        embed_scale=raw["scale_emb"] if minicpm else 1.0,
        residual_scale=raw["scale_depth"] / layers**0.5 if minicpm else 1.0,
        logits_divisor=divisor,
        key_bias=not minicpm,
    )
    local = sparse["window_size"] // sparse["block_size"]
    return config, SparseConfig(
        local_blocks=local,
        block_budget=sparse["topk"] + local,
        query_blocks=sparse.get("select_blocks", 0),
        # As the reference does; parity needs it (specification §10.2).
        mask_future_blocks=False,
    )


@pytest.fixture(scope="session")
def golden_model(golden):
    """`golden_model(name)`: (config, sparse, decoder) of "minicpm" or "nosa"."""

    @functools.cache
    def build(name: str):
        arrays = golden(f"{name}_tiny")
        config, sparse = _golden_configs(json.loads(str(arrays["config_json"])))
        weights = {
            key[2:]: functools.partial(lambda key: arrays[key].astype(np.float32), key)
            for key in arrays.keys()
            if key.startswith("w/")
        }
        model = build_decoder(config, weights, dtype=jnp.float32, storage="stacked")
        future = np.stack(
            [weights[future_name(layer)]() for layer in range(config.num_layers - 1)]
        )
        heads = forecast_heads(config, future, weights[CURRENT](), jnp.float32)
        model.set_forecast(heads)
        return config, sparse, model

    return build


@pytest.fixture(scope="session")
def random_model():
    """`random_model(name)`: a decoder of a tiny preset, stacked."""

    @functools.cache
    def build(name: str = "tiny"):
        preset = get_preset(name)
        tensors = random_tensors(preset.model, seed=0, scale=0.1)
        return build_decoder(
            preset.model, tensors, dtype=jnp.float32, storage="stacked"
        )

    return build
