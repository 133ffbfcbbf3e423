"""Files of every family give the logits of the textbook decoder."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from textbook import textbook_logits

import sparda_jax as sj

# What each has is in another one too.
LONG = [pytest.mark.slow, pytest.mark.long]
BIASES = {"attention_bias": True, "output_bias": True}


def _check(path, config, tensors):
    lm = sj.load(path, storage="stacked", dtype="float32")
    assert lm.config == config
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 24)
    wanted = textbook_logits(config, tensors, ids)
    np.testing.assert_allclose(sj.forward(lm, ids), wanted, atol=2e-4, rtol=1e-4)


def _weights(kit, config):
    return {
        name: array if array.ndim == 1 else 0.2 * array
        for name, array in kit.tensors(config).items()
    }


def test_mistral_as_safetensors(kit):
    config = dataclasses.replace(
        kit.config, name="mistral", tie_embeddings=False, eos_ids=(2,)
    )
    values = {
        "model_type": "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    tensors = _weights(kit, config)
    folder = kit.folder / "mistral"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    _check(folder, config, tensors)


@pytest.mark.parametrize(
    ("arch", "features"),
    [
        # Mistral's files are of this architecture.
        pytest.param("llama", {"tie_embeddings": False}, marks=LONG),
        ("llama", BIASES),
        pytest.param("qwen3", {"qk_norm": True, "head_dim": 16}, marks=LONG),
        # Mixtral's, too.
        ("llama", {"num_experts": 4, "experts_per_token": 2}),
        ("qwen3moe", {"qk_norm": True, "num_experts": 8, "experts_per_token": 3}),
    ],
)
def test_gguf(kit, arch, features):
    config = dataclasses.replace(kit.config, name=arch, **features)
    metadata = kit.metadata(config, arch)
    metadata[f"{arch}.attention.key_length"] = config.head_dim
    metadata[f"{arch}.attention.value_length"] = config.head_dim
    if config.num_experts:
        metadata[f"{arch}.expert_count"] = config.num_experts
        metadata[f"{arch}.expert_used_count"] = config.experts_per_token
    if arch == "qwen3moe":
        metadata[f"{arch}.feed_forward_length"] = 9999
        metadata[f"{arch}.expert_feed_forward_length"] = config.ffn_size
    tensors = _weights(kit, config)
    stored = kit.gguf_tensors(config, tensors, permute=arch == "llama")
    _check(kit.write_gguf(metadata, stored, arch=arch), config, tensors)
