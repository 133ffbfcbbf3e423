"""Fixtures of the tests that run models."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.weights import build_decoder, from_query_heads, random_tensors


@pytest.fixture(scope="session")
def token_ids():
    """`token_ids(length, seed)` draws ids of the tiny vocabulary."""

    def draw(length: int, seed: int = 0) -> list[int]:
        rng = np.random.default_rng(seed)
        return rng.integers(2, 128, size=length).tolist()

    return draw


@pytest.fixture(scope="session")
def lm():
    """A tiny random model with SparDA attention, whose blocks do not all fit."""
    return sj.load(
        "tiny",
        attention="sparda",
        forecast="from_query",
        sparse=sj.SparseConfig(local_blocks=2, block_budget=6),
        storage="stacked",
    )


@pytest.fixture(scope="session")
def deeper():
    """`deeper(nosa, storage)` is a model of three layers, as offload tests need."""

    @functools.cache
    def make(nosa: bool, storage: str) -> Decoder:
        preset = PRESETS["tiny-nosa" if nosa else "tiny"].model
        tensors = random_tensors(preset, seed=1, scale=0.15)
        model = build_decoder(preset, tensors, dtype=jnp.float32, storage=storage)
        model.set_forecast(from_query_heads(model))
        return model

    return make
