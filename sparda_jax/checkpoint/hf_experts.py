"""Experts of a safetensors directory: one tensor each there, one for all here."""

import os
import re
from collections.abc import Mapping

import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.tensors import StackedTensor, TensorLoader
from sparda_jax.config import ModelConfig
from sparda_jax.models.families import family_of_model
from sparda_jax.models.spec import layer_name

_EXPERT = "{expert}"


def _stored_names(config: ModelConfig) -> Mapping[str, str]:
    family = family_of_model(config)
    return {} if family is None else family.stored_names


def join_experts(
    path: str | os.PathLike, config: ModelConfig, found: Mapping[str, TensorLoader]
) -> dict[str, TensorLoader]:
    """Loaders by the names of the table, experts stacked.

    Args:
      path: For messages.
      config: The model's.
      found: Loaders by the names of the file.

    Raises:
      CheckpointError: An expert's tensor is missing, or shaped as no other one is.
    """
    names = _stored_names(config)
    if not names:
        return dict(found)
    left, joined = dict(found), {}

    def take(name: str) -> TensorLoader:
        if name not in left:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        return left.pop(name)

    for layer in range(config.num_layers):
        for ours, theirs in names.items():
            stored = layer_name(layer, theirs)
            if _EXPERT not in theirs:
                joined[layer_name(layer, ours)] = take(stored)
                continue
            numbered = [
                stored.replace(_EXPERT, str(expert))
                for expert in range(config.num_experts)
            ]
            parts = tuple(take(name) for name in numbered)
            for name, part in zip(numbered, parts, strict=True):
                if part.shape != parts[0].shape:
                    raise CheckpointError(
                        f"{path}: tensor {name} has shape {list(part.shape)}, wanted "
                        f"{list(parts[0].shape)}, as {numbered[0]}"
                    )
            joined[layer_name(layer, ours)] = StackedTensor(parts)
    return left | joined


def split_experts(
    config: ModelConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Inverse of `join_experts`, for writing; the arrays are views."""
    names = _stored_names(config)
    split: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        theirs = names.get(match[2]) if match else None
        if match is None or theirs is None:
            split[name] = array
            continue
        stored = layer_name(int(match[1]), theirs)
        if _EXPERT not in theirs:
            split[stored] = array
            continue
        for expert, part in enumerate(array):
            split[stored.replace(_EXPERT, str(expert))] = part
    return split
