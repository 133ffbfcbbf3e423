"""Rotary settings of a config.json, read and written; the same in every family.

They stand in `rope_parameters` (new files) or `rope_scaling` (old ones). Where a file
has both, `rope_scaling` counts alone, as in the library that writes these files.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sparda_jax.config import ModelConfig, RopeConfig
from sparda_jax.models.families.fields import Fields

_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
# Keys by kind, besides the kind itself and rope_theta.
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "longrope": frozenset(
        {"short_factor", "long_factor", _ORIGINAL, "factor", "attention_factor"}
    ),
    "yarn": frozenset(
        {
            "factor",
            _ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def _settings(fields: Fields) -> tuple[Fields, str]:
    """The object with the settings, empty if there is none, and the kind."""
    scaling = fields.inner("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = fields.inner("rope_parameters")
    if scaling is None:
        return Fields({}, fields.fail), "default"
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise scaling.fail("rope_type", kind, f"one of {', '.join(_KEYS)}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.fail(
            "partial_rotary_factor", scaling.values["partial_rotary_factor"], "1"
        )
    for key, value in scaling.values.items():
        if key not in _KEYS[kind] | _COMMON and value is not None:
            allowed = ", ".join(sorted(_KEYS[kind])) or "nothing more"
            raise scaling.fail(key, value, f"for {kind!r}: {allowed}")
    return scaling, kind


def _theta(fields: Fields, scaling: Fields) -> float:
    theta = scaling.number("rope_theta", fields.number("rope_theta", _THETA))
    unused = fields.inner("rope_parameters")
    if unused is not None and unused.number("rope_theta", theta) != theta:
        raise unused.fail(
            "rope_theta",
            unused.values["rope_theta"],
            f"{theta}, as beside rope_scaling, which replaces rope_parameters",
        )
    return theta


def _original(fields: Fields, scaling: Fields) -> int:
    """Positions before stretching: outside of the settings, in them, or all."""
    inside = scaling.integer(_ORIGINAL, fields.integer("max_position_embeddings"))
    return fields.integer(_ORIGINAL, inside)


def _longrope_magnitude(fields: Fields, scaling: Fields, original: int) -> float | None:
    """attention_factor, None where RopeConfig's own rule gives the same."""
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    ratio = fields.integer("max_position_embeddings") / original
    factor = scaling.number("factor", ratio)
    if factor == ratio:
        return None
    if fields.get("model_type") == "minicpm":  # Its own code reads no factor.
        raise scaling.fail("factor", factor, f"max_position_embeddings / {_ORIGINAL}")
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))


def _yarn_magnitude(scaling: Fields, factor: float) -> float | None:
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    if not (scaling.has("mscale") and scaling.has("mscale_all_dim")):
        return None

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = scaling.number("mscale"), scaling.number("mscale_all_dim")
    return magnitude(above) / magnitude(below)


def _linear(fields: Fields, scaling: Fields, theta: float) -> RopeConfig:
    return RopeConfig(kind="linear", theta=theta, factor=scaling.number("factor"))


def _llama3(fields: Fields, scaling: Fields, theta: float) -> RopeConfig:
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=scaling.number("factor"),
        original_max=_original(fields, scaling),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
    )


def _longrope(fields: Fields, scaling: Fields, theta: float) -> RopeConfig:
    original = _original(fields, scaling)
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_max=original,
        short_factors=scaling.numbers("short_factor"),
        long_factors=scaling.numbers("long_factor"),
        attention_factor=_longrope_magnitude(fields, scaling, original),
        longrope_max=fields.integer("max_position_embeddings"),
    )


def _yarn(fields: Fields, scaling: Fields, theta: float) -> RopeConfig:
    if not scaling.flag("truncate", True):
        raise scaling.fail("truncate", False, "true")
    factor = scaling.number("factor")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max=_original(fields, scaling),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=_yarn_magnitude(scaling, factor),
    )


_READERS: Mapping[str, Callable[[Fields, Fields, float], RopeConfig]] = {
    "default": lambda fields, scaling, theta: RopeConfig(theta=theta),
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}


def read_rope(fields: Fields) -> RopeConfig:
    """Rotary embedding of a config.json."""
    scaling, kind = _settings(fields)
    return _READERS[kind](fields, scaling, _theta(fields, scaling))


def read_max_context(fields: Fields) -> int:
    """Longest context.

    YaRN's max_position_embeddings is the length before stretching in the files of
    Qwen, and the one after it in others.
    """
    trained = fields.integer("max_position_embeddings")
    scaling, kind = _settings(fields)
    if kind == "yarn":
        factor = min(scaling.number("factor"), 1e6)
        return max(trained, int(_original(fields, scaling) * factor))
    return trained


def rope_json(config: ModelConfig) -> dict[str, Any] | None:
    """Inverse of `read_rope`, for `rope_scaling`; None for plain frequencies.

    Raises:
      ValueError: No config.json can say what it is.
    """
    rope = config.rope
    if rope.kind == "default":
        return None
    values: dict[str, Any]
    if rope.kind == "longrope":
        if rope.longrope_max not in (None, config.max_context):
            raise ValueError(
                f"rope.longrope_max = {rope.longrope_max}, allowed in a config.json: "
                f"max_context = {config.max_context}"
            )
        values = {
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            _ORIGINAL: rope.original_max,
            "attention_factor": rope.attention_factor,
        }
    elif rope.kind == "linear":
        values = {"factor": rope.factor}
    elif rope.kind == "llama3":
        values = {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            _ORIGINAL: rope.original_max,
        }
    else:
        values = {
            "factor": rope.factor,
            _ORIGINAL: rope.original_max,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    kept = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rope.kind, **kept}
