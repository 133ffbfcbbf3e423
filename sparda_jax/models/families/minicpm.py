"""MiniCPM: Llama's form with muP scales."""

import math
from collections.abc import Callable
from typing import Any

from sparda_jax.config import ModelConfig
from sparda_jax.models.families.family import (
    BIASES,
    SCALED,
    Family,
    read_biases,
    refuse_window,
)
from sparda_jax.models.families.fields import Fields


def read(fields: Fields) -> dict[str, Any]:
    """The scales, as multipliers and divisors of what they scale."""
    refuse_window(fields, fields.get("sliding_window"))
    layers = fields.integer("num_hidden_layers")
    hidden = fields.integer("hidden_size")
    return {
        "embed_scale": fields.number("scale_emb"),
        "residual_scale": fields.number("scale_depth") / math.sqrt(layers),
        "logits_divisor": hidden / fields.number("dim_model_base"),
    } | read_biases(fields)


def _exact_operand(
    want: float, guess: float, compute: Callable[[float], float]
) -> float:
    """The float near `guess` that `compute` turns into `want` exactly, if there is one.

    Without it, reading a file that was written would give another last bit.
    """
    for candidate in (guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf)):
        if compute(candidate) == want:
            return candidate
    return guess


def write(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read`."""
    root = math.sqrt(config.num_layers)
    base = _exact_operand(
        config.logits_divisor,
        config.hidden_size / config.logits_divisor,
        lambda value: config.hidden_size / value,
    )
    depth = _exact_operand(
        config.residual_scale,
        config.residual_scale * root,
        lambda value: value / root,
    )
    return {
        "scale_emb": config.embed_scale,
        "scale_depth": depth,
        "dim_model_base": int(base) if base == int(base) else base,
        "attention_bias": config.attention_bias,
    }


MINICPM = Family(
    name="minicpm",
    model_type="minicpm",
    read=read,
    variants=(frozenset({SCALED}), BIASES | {SCALED}),
    write=write,
)
