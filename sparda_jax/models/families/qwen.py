"""Qwen2 and 2.5 (biases of q, k and v) and Qwen3 (norms of q and k)."""

from typing import Any

from sparda_jax.models.families.family import (
    BIASES,
    Family,
    read_biases,
    refuse_window,
)
from sparda_jax.models.families.fields import Fields

_DEFAULT_WINDOW = 4096
_DEFAULT_FULL_LAYERS = 28  # max_window_layers: the layers before it see everything.


def _refuse_window(fields: Fields) -> None:
    """The window holds for the layers from max_window_layers on, if it is on.

    `layer_types` says it for each layer, and where it is there it alone counts.
    """
    if not fields.flag("use_sliding_window", False) or fields.has("layer_types"):
        return
    full = fields.integer("max_window_layers", _DEFAULT_FULL_LAYERS, least=0)
    if full < fields.integer("num_hidden_layers"):
        refuse_window(fields, fields.values.get("sliding_window", _DEFAULT_WINDOW))


def read_qwen2(fields: Fields) -> dict[str, Any]:
    """The biases are always there, whatever `attention_bias` says."""
    _refuse_window(fields)
    return {"attention_bias": True}


def read_qwen3(fields: Fields) -> dict[str, Any]:
    """The norms are always there."""
    _refuse_window(fields)
    return {"qk_norm": True} | read_biases(fields)


QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    read=read_qwen2,
    variants=(frozenset({"attention_bias"}),),
    kv_heads=32,
    architecture="qwen2",
    optional=("attention_bias",),
)
QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    read=read_qwen3,
    variants=(frozenset({"qk_norm"}), BIASES | {"qk_norm"}),
    head_dim=128,
    kv_heads=32,
    architecture="qwen3",
    fixed=("qk_norm",),
)
