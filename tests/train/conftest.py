"""Random tiny models for the trainer's tests."""

import functools

import jax.numpy as jnp
import pytest
from text_model import text_tokenizer

from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import build_decoder, random_tensors

__all__ = ["text_tokenizer"]


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
