"""Parameter counts, rotary variants and weights of every architecture option."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from textbook import textbook_logits

import sparda_jax as sj
from sparda_jax.config import ConfigError, RopeConfig, SparseConfig
from sparda_jax.models.presets import PRESETS, get_preset
from sparda_jax.models.rope import rope_frequencies
from sparda_jax.models.spec import (
    base_shapes,
    num_forecast_parameters,
    num_parameters,
)
from sparda_jax.models.weights import build_decoder, random_tensors
from sparda_jax.sparse.selectors import get_selector


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("minicpm4.1-8b", 8_185_253_888),
        ("nosa-8b", 8_185_270_336),
        ("smollm2-135m", 134_515_008),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-coder-0.5b", 630_167_424),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_parameter_counts(name, count):
    assert num_parameters(PRESETS[name].model) == count


def test_forecast_is_under_half_a_percent():
    for name in ("minicpm4.1-8b", "nosa-8b"):
        config = PRESETS[name].model
        assert num_forecast_parameters(config) == 33_554_432
        assert num_forecast_parameters(config) / num_parameters(config) < 0.005


def test_reference_selection_of_the_8b_presets():
    minicpm = PRESETS["minicpm4.1-8b"].sparse
    assert (minicpm.block_budget, minicpm.forced_blocks) == (96, 34)
    nosa = PRESETS["nosa-8b"].sparse
    assert (nosa.block_budget, nosa.forced_blocks) == (96, 18)


def test_unknown_preset_names_what_there_is():
    with pytest.raises(ConfigError, match="smollm2-135m"):
        get_preset("gpt-5")


def test_linear_rope_divides():
    plain, _ = rope_frequencies(RopeConfig(), 64, 10)
    scaled, scale = rope_frequencies(RopeConfig(kind="linear", factor=4.0), 64, 10)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)
    assert scale == 1.0


def test_llama3_rope_bands():
    """Fast channels untouched, slow ones divided by the factor, between in between."""
    rope = PRESETS["llama-3.1-8b"].model.rope
    plain, _ = rope_frequencies(RopeConfig(theta=rope.theta), 128, 10)
    scaled, _ = rope_frequencies(rope, 128, 10)
    wavelength = 2 * math.pi / plain
    fast = wavelength < rope.original_max / rope.high_freq_factor
    slow = wavelength > rope.original_max / rope.low_freq_factor
    np.testing.assert_allclose(scaled[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    middle = ~fast & ~slow
    assert middle.any()
    assert np.all(scaled[middle] < plain[middle])
    assert np.all(scaled[middle] > plain[middle] / 8)


def test_yarn_keeps_high_frequencies_and_scales():
    """The reference's runtime has the ramp inverted (docs/algorithm.md §7.5)."""
    rope = RopeConfig(kind="yarn", factor=4.0, original_max=4096)
    plain, _ = rope_frequencies(RopeConfig(), 128, 10)
    scaled, scale = rope_frequencies(rope, 128, 10)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    assert np.all(np.diff(scaled / plain) <= 1e-6)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_longrope_takes_one_list_for_a_request():
    rope = RopeConfig(
        kind="longrope",
        original_max=100,
        longrope_max=400,
        short_factors=(1.0,) * 8,
        long_factors=(2.0,) * 8,
    )
    short, scale = rope_frequencies(rope, 16, 100)
    long, _ = rope_frequencies(rope, 16, 101)
    np.testing.assert_allclose(long, short / 2, rtol=1e-6)
    assert scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(100)))


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Both in the next one, and in `test_gguf` of the families.
        pytest.param(
            {"attention_bias": True}, marks=[pytest.mark.slow, pytest.mark.long]
        ),
        {"attention_bias": True, "output_bias": True},
        {"qk_norm": True},
        {"tie_embeddings": False},
        {"key_bias": True},
        {"embed_scale": 3.0, "residual_scale": 0.4, "logits_divisor": 2.0},
        {"num_kv_heads": 8},
        {"rope": RopeConfig(kind="yarn", factor=4.0, original_max=32)},
    ],
)
def test_every_option_equals_a_textbook_decoder(changes):
    config = dataclasses.replace(PRESETS["tiny"].model, num_layers=2, **changes)
    tensors = random_tensors(config, seed=3, scale=0.2)
    assert set(tensors) == {name for name, _ in base_shapes(config)}
    if "rope" in changes:
        _, scale = rope_frequencies(config.rope, config.head_dim, 50)
        # The textbook form above has no cos/sin multiplier.
        rope = dataclasses.replace(config.rope, attention_factor=1.0)
        assert scale > 1
        config = dataclasses.replace(config, rope=rope)
    model = build_decoder(config, tensors, dtype=jnp.float32, storage="stacked")
    dense = sj.LanguageModel(
        model,
        config,
        SparseConfig(),
        get_selector("dense"),
        tokenizer=None,
        fingerprint=None,
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 50)
    got = sj.forward(dense, ids)
    np.testing.assert_allclose(
        got,
        textbook_logits(config, {n: load() for n, load in tensors.items()}, ids),
        atol=2e-4,
        rtol=1e-4,
    )
