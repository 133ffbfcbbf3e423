"""Qwen2 and 2.5 (biases of q, k and v) and Qwen3 (norms of q and k), each with experts
or without."""

from typing import Any

from sparda_jax.config import ModelConfig
from sparda_jax.models.families.family import (
    BIASES,
    EXPERTS,
    SHARED,
    UNNORMALIZED,
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


def _read_experts(fields: Fields) -> dict[str, Any]:
    """The router; every layer must have experts."""
    if fields.integer("decoder_sparse_step", 1) != 1:
        raise fields.fail(
            "decoder_sparse_step", fields.get("decoder_sparse_step"), "1: all layers"
        )
    if fields.get("mlp_only_layers"):
        raise fields.fail("mlp_only_layers", fields.get("mlp_only_layers"), "[]")
    return {"normalize_router": fields.flag("norm_topk_prob", False)}


def read_qwen2_moe(fields: Fields) -> dict[str, Any]:
    """As Qwen2, and the width of the shared expert."""
    _refuse_window(fields)
    if not fields.flag("qkv_bias", True):
        raise fields.fail("qkv_bias", False, "true")
    shared = fields.integer("shared_expert_intermediate_size", 5632)
    own = {"attention_bias": True, "shared_ffn_size": shared}
    return own | _read_experts(fields)


def read_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """As Qwen3."""
    return read_qwen3(fields) | _read_experts(fields)


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """What both kinds say of their experts."""
    values: dict[str, Any] = {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.ffn_size,
        "norm_topk_prob": config.normalize_router,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if config.shared_ffn_size:
        return values | {"shared_expert_intermediate_size": config.shared_ffn_size}
    return values | {"attention_bias": config.attention_bias}


_STORED = {
    f"mlp.experts.{part}_proj.weight": f"mlp.experts.{{expert}}.{part}_proj.weight"
    for part in ("gate", "up", "down")
}
_QWEN2_EXPERTS = frozenset({"attention_bias", EXPERTS, SHARED})
_QWEN3_EXPERTS = frozenset({"qk_norm", EXPERTS})
QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    read=read_qwen2_moe,
    variants=(_QWEN2_EXPERTS, _QWEN2_EXPERTS | {UNNORMALIZED}),
    write=write_experts,
    kv_heads=16,
    ffn_size=("moe_intermediate_size", 1408),
    experts=(60, 4),
    stored_names=_STORED,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    read=read_qwen3_moe,
    variants=(
        _QWEN3_EXPERTS,
        _QWEN3_EXPERTS | {UNNORMALIZED},
        _QWEN3_EXPERTS | BIASES,
        _QWEN3_EXPERTS | BIASES | {UNNORMALIZED},
    ),
    write=write_experts,
    kv_heads=4,
    architecture="qwen3moe",
    fixed=("qk_norm",),
    ffn_size=("moe_intermediate_size", 768),
    experts=(128, 8),
    stored_names=_STORED,
)
