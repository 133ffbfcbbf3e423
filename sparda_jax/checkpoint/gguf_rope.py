"""The rotary embedding of a GGUF file: metadata, and divisors that are tensors."""

import math
from collections.abc import Mapping

import numpy as np

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.gguf_tensor import PLAIN, GGUFTensor
from sparda_jax.config import RopeConfig
from sparda_jax.models.families.fields import Fields

# Frequency divisors, which become part of the configuration.
ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
Tensors = Mapping[str, GGUFTensor]


def _read_vector(tensors: Tensors, name: str, size: int) -> tuple[float, ...]:
    tensor = tensors[name]
    layout.check_shape(tensor.path, name, tensor.shape, (size,))
    if tensor.kind not in PLAIN:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} has type {tensor.kind.name}, allowed: F32, "
            "F16, BF16"
        )
    return tuple(tensor().astype(np.float64).tolist())


def _scaling_type(fields: Fields) -> str:
    kind = fields.get("rope.scaling.type")
    if kind is None:
        return "linear" if fields.has("rope.scaling.factor") else "none"
    if not isinstance(kind, str):
        raise fields.fail("rope.scaling.type", kind, "a string")
    return kind


def read_rope(fields: Fields, tensors: Tensors, head_dim: int) -> RopeConfig:
    """Rotary embedding of a GGUF file.

    Args:
      fields: Metadata of the architecture.
      tensors: All tensors by GGUF name.
      head_dim: H.

    Raises:
      CheckpointError: The file asks for what is not supported.
    """
    theta = fields.number("rope.freq_base", 10000.0)
    kind = _scaling_type(fields)
    has_freqs = "rope_freqs.weight" in tensors
    has_lists = [name in tensors for name in ROPE_TENSORS[1:]]
    if has_freqs and (any(has_lists) or kind != "none"):
        raise fields.fail(
            "rope.scaling.type", kind, "'none' in a file with rope_freqs.weight"
        )
    if has_freqs:
        # Llama 3 files hold their band scaling as ready divisors of the frequencies:
        # the same arithmetic as LongRoPE with one list for every length.
        divisors = _read_vector(tensors, "rope_freqs.weight", head_dim // 2)
        context = fields.integer("context_length")
        return RopeConfig(
            kind="longrope",
            theta=theta,
            original_max=context,
            short_factors=divisors,
            long_factors=divisors,
            attention_factor=1.0,
            longrope_max=context,
        )
    if any(has_lists) or kind == "longrope":
        if not all(has_lists):
            raise fields.fail(
                "rope.scaling.type",
                kind,
                f"another one: longrope needs the tensors {ROPE_TENSORS[1]} and "
                f"{ROPE_TENSORS[2]}",
            )
        return _longrope(fields, tensors, head_dim, theta)
    return _scaled(fields, kind, theta)


def _longrope(
    fields: Fields, tensors: Tensors, head_dim: int, theta: float
) -> RopeConfig:
    context = fields.integer("context_length")
    long_list, short_list = (
        _read_vector(tensors, name, head_dim // 2) for name in ROPE_TENSORS[1:]
    )
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_max=fields.integer("rope.scaling.original_context_length", context),
        short_factors=short_list,
        long_factors=long_list,
        attention_factor=fields.number("rope.scaling.attn_factor", 1.0),
        longrope_max=context,
    )


def _scaled(fields: Fields, kind: str, theta: float) -> RopeConfig:
    factor = fields.number(
        "rope.scaling.factor", fields.number("rope.scale_linear", 1.0)
    )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor)
    if kind == "yarn":
        attention = fields.number("rope.scaling.attn_factor", 1.0)
        context = fields.integer("context_length")
        return RopeConfig(
            kind="yarn",
            theta=theta,
            factor=factor,
            original_max=fields.integer(
                "rope.scaling.original_context_length", context
            ),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=attention * (0.1 * math.log(max(factor, 1.0)) + 1.0),
        )
    raise fields.fail(
        "rope.scaling.type", kind, "'none', 'linear', 'yarn' or 'longrope'"
    )
