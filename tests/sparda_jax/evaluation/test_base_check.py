"""Heads of one base model on another file of it, and on another model."""

import dataclasses

import numpy as np
import pytest
from text_model import text_tokenizer

import sparda_jax as sj
from sparda_jax.checkpoint.forecast import ForecastWeights, save_forecast
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import from_query_heads, random_tensors

TINY = dataclasses.replace(get_preset("tiny").model, num_layers=2, eos_ids=(2,))

__all__ = ["text_tokenizer"]


@pytest.mark.slow
def test_another_quantisation_passes_and_another_model_does_not(
    tmp_path, text_tokenizer
):
    def written(name, seed, noise=0.0):
        rng = np.random.default_rng(9)
        tensors = {
            key: (x := load()) * (1 + noise * rng.standard_normal(x.shape))
            for key, load in random_tensors(TINY, seed, scale=0.2).items()
        }
        save_hf(tmp_path / name, TINY, tensors, text_tokenizer)
        return str(tmp_path / name)

    base, near, far = written("a", 0), written("b", 0, 0.01), written("c", 5)
    lm = sj.load(base, attention="infllm_v2")
    # A query for each query head: exact in layer 0, near in layer 1.
    heads = np.stack([np.asarray(x).T for x in from_query_heads(lm.model, 4)])
    weights = ForecastWeights(heads[1:], heads[0], lm.fingerprint, lm.sparse, queries=4)
    file = tmp_path / "heads.safetensors"
    save_forecast(file, weights, base_name="a")
    options = {"attention": "sparda", "forecast": file}
    with pytest.raises(sj.CheckpointError, match="fingerprint"):
        sj.load(near, **options)
    options["forecast_base"] = "same-architecture"
    assert sj.load(near, **options).config.forecast_queries == 4
    with pytest.raises(sj.ConfigError, match=r"find 0\.\d+ of the blocks"):
        sj.load(far, **options)
