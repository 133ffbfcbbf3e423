"""A tiny model as a directory of safetensors."""

import dataclasses
import pathlib

from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.config import ModelConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import random_tensors

TINY = dataclasses.replace(get_preset("tiny").model, num_layers=2, eos_ids=(2,))


def tiny_directory(
    path: pathlib.Path, tokenizer: Tokenizer, config: ModelConfig = TINY
) -> pathlib.Path:
    """Writes random weights with a tokenizer; returns the path."""
    tensors = random_tensors(config, seed=0, scale=0.2)
    save_hf(path, config, {k: load() for k, load in tensors.items()}, tokenizer)
    return path
