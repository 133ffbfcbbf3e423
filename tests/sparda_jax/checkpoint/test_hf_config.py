"""Every setting of config.json that changes the arithmetic: honoured, or refused.

What each one means was compared once with transformers 5.24 on random weights; logits
agreed to 2e-6 of the largest, wherever a case below is not refused.
"""

import dataclasses
import math

import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.hf_config import model_config
from sparda_jax.config import ModelConfig, RopeConfig
from sparda_jax.models.families import FAMILIES

PLAIN = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
READ = ModelConfig(
    name="m",
    vocab_size=96,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=128,
    rms_norm_eps=1e-5,
)
BIASES = {"attention_bias": True, "output_bias": True}


def _read(tmp_path, changes, tensors=()):
    values = PLAIN | changes
    kept = {key: value for key, value in values.items() if value != "no such key"}
    return model_config(
        tmp_path / "m" / "config.json",
        kept,
        tensors=tensors,
        has_head=True,
        bos_id=None,
        eos_ids=(),
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"attention_bias": True}, BIASES),
        ({"head_dim": 16}, {"head_dim": 16}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": "no such key"}, {"num_kv_heads": 4}),
        ({"rms_norm_eps": "no such key"}, {"rms_norm_eps": 1e-6}),
        ({"hidden_act": "silu", "mlp_bias": False, "is_causal": True}, {}),
        # No part of Llama; as long as no sequence outgrows it, it changes nothing.
        ({"sliding_window": 128}, {}),
        ({"sliding_window": None}, {}),
        ({"layer_types": ["full_attention"] * 2}, {}),
        # Qwen2 has its biases whatever the file says; Qwen3 has what it says.
        ({"model_type": "qwen2"}, {"attention_bias": True}),
        ({"model_type": "qwen2", "attention_bias": False}, {"attention_bias": True}),
        ({"model_type": "qwen3"}, {"qk_norm": True}),
        ({"model_type": "qwen3", "attention_bias": True}, {"qk_norm": True} | BIASES),
        (
            {"model_type": "qwen3", "head_dim": "no such key"},
            {"qk_norm": True, "head_dim": 128},
        ),
        (
            {"model_type": "qwen3", "num_attention_heads": 32}
            | {"num_key_value_heads": "no such key"},
            {"qk_norm": True, "num_heads": 32, "num_kv_heads": 32},
        ),
        # The window holds for the layers from max_window_layers on, if it is on.
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4},
            {"attention_bias": True},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"max_window_layers": 2},
            {"attention_bias": True},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"max_window_layers": 0, "layer_types": ["full_attention"] * 2},
            {"attention_bias": True},
        ),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "mistral", "sliding_window": 128}, {}),
        (
            {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 4}
            | {"num_key_value_heads": "no such key"},
            {"num_heads": 8, "num_kv_heads": 8, "head_dim": 4},
        ),
        (
            {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4}
            | {"dim_model_base": 16, "attention_bias": True},
            {"embed_scale": 12.0, "residual_scale": 1.4 / math.sqrt(2)}
            | {"logits_divisor": 2.0}
            | BIASES,
        ),
    ],
)
def test_honoured(tmp_path, changes, wanted):
    assert _read(tmp_path, changes) == dataclasses.replace(READ, **wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "sliding_window = 64, allowed: null, or at least max"),
        ({"sliding_window": "x"}, "sliding_window = 'x'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "mistral", "sliding_window": 127}, "sliding_window = 127"),
        # Without the key the window is 4096; null turns it off.
        (
            {"model_type": "mistral", "max_position_embeddings": 32768},
            "sliding_window = 4096",
        ),
        (
            {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
            "attention_bias = True",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"max_window_layers": 1},
            "sliding_window = 4",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True}
            | {"max_window_layers": 0, "max_position_embeddings": 40960},
            "sliding_window = 4096",
        ),
        ({"layer_types": ["full_attention"]}, "one type a layer"),
        ({"layer_types": "full_attention"}, "one type a layer"),
        ({"is_causal": False}, "is_causal = False"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"mlp_bias": 1}, "mlp_bias = 1"),
        ({"model_type": "mistral3"}, "model_type = 'mistral3'"),
        ({"rope_scaling": {"rope_type": None}}, "rope_type = None"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]"),
        ({"rope_scaling": {"type": "x" * 500}}, "rope_type"),
        ({"rope_scaling": {"x" * 500: 1}}, "rope_scaling.xxx"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        _read(tmp_path, changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
READ_YARN = RopeConfig(kind="yarn", factor=4.0, original_max=32)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LISTS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64} | LISTS
READ_LONG = RopeConfig(
    kind="longrope",
    original_max=64,
    longrope_max=128,
    short_factors=(1.0, 1.5, 2.0, 3.0),
    long_factors=(1.0, 2.0, 4.0, 8.0),
)
OUTSIDE = {"original_max_position_embeddings": 16}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_parameters": PLAIN_ROPE | {"rope_theta": 3e4}}, RopeConfig(theta=3e4)),
        # rope_scaling replaces rope_parameters; an empty or null one does not.
        ({"rope_parameters": PLAIN_ROPE, "rope_scaling": YARN}, READ_YARN),
        ({"rope_parameters": PLAIN_ROPE, "rope_scaling": {}}, RopeConfig()),
        ({"rope_parameters": YARN, "rope_scaling": None}, READ_YARN),
        (
            {"rope_parameters": PLAIN_ROPE | {"rope_theta": 1e6}, "rope_theta": 1e6}
            | {"rope_scaling": YARN},
            dataclasses.replace(READ_YARN, theta=1e6),
        ),
        ({"rope_scaling": {"type": "yarn"} | YARN}, READ_YARN),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            dataclasses.replace(READ_YARN, original_max=128),
        ),
        # What stands outside of the settings counts before what stands in them.
        (
            {"rope_scaling": YARN} | OUTSIDE,
            dataclasses.replace(READ_YARN, original_max=16),
        ),
        (
            {"rope_scaling": YARN | {"rope_theta": 1e6}, "rope_theta": 1e3},
            dataclasses.replace(READ_YARN, theta=1e6),
        ),
        (
            {"rope_scaling": LLAMA3} | OUTSIDE,
            RopeConfig(kind="llama3", factor=8.0, original_max=16),
        ),
        ({"rope_scaling": LONG}, READ_LONG),
        (
            {"rope_scaling": LONG} | OUTSIDE,
            dataclasses.replace(READ_LONG, original_max=16),
        ),
        ({"rope_scaling": LONG | {"factor": 2.0}}, READ_LONG),
        # Another factor than the ratio of lengths makes the magnitude.
        (
            {"rope_scaling": LONG | {"factor": 8.0}},
            dataclasses.replace(
                READ_LONG,
                attention_factor=math.sqrt(1 + math.log(8.0) / math.log(64)),
            ),
        ),
        (
            {"rope_scaling": LONG | {"factor": 0.5}},
            dataclasses.replace(READ_LONG, attention_factor=1.0),
        ),
    ],
)
def test_rope(tmp_path, changes, wanted):
    """No form of them is dropped without a word (public report sglang#26187)."""
    assert _read(tmp_path, changes).rope == wanted


def test_two_bases_are_refused(tmp_path):
    """rope_scaling would win with a base of its own: hardly what was meant."""
    both = {"rope_parameters": PLAIN_ROPE | {"rope_theta": 1e6}, "rope_scaling": YARN}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta = 1000000"):
        _read(tmp_path, both)


def test_families_are_told_apart(tmp_path):
    """NOSA by its tensors; no two families write the same config.json."""
    tensors = ["model.layers.0.self_attn.A"]
    assert _read(tmp_path, {}, tensors).key_bias
    assert not _read(tmp_path, {}, ["model.layers.0.mlp.A"]).key_bias
    with pytest.raises(CheckpointError, match=r"'llama' for weights with \.self_attn"):
        _read(tmp_path, {"model_type": "qwen2"}, tensors)
    variants = [variant for family in FAMILIES for variant in family.variants]
    assert len(variants) == len(set(variants))
