"""Hugging Face's config.json to ModelConfig and SparseConfig, and back.

What a file asks for and this project does not have is refused by name: a setting that
is silently dropped gives a model that answers, but wrongly.
"""

import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError, readable, show
from sparda_jax.config import ConfigError, ModelConfig, SparseConfig
from sparda_jax.models.families import (
    FAMILIES,
    MODEL_TYPES,
    family_of_config_json,
    family_of_model,
    marked_family,
)
from sparda_jax.models.families.family import (
    Family,
    read_experts,
    refuse_layer_types,
    refuse_neutral,
    variant_of,
)
from sparda_jax.models.families.fields import Fields
from sparda_jax.models.families.rope import read_max_context, read_rope, rope_json

_SPARSE_KEYS = frozenset(
    {
        "kernel_size",
        "kernel_stride",
        "init_blocks",
        "block_size",
        "window_size",
        "topk",
        "select_blocks",
        "dense_len",
        "use_q_future_decode_only",
        "use_nope",
    }
)


def _fields(path: str | os.PathLike, values: Mapping[str, Any]) -> Fields:
    def fail(key: str, value: object, allowed: str) -> CheckpointError:
        key = key if len(key) <= 80 else show(key)
        return CheckpointError(f"{path}: {key} = {show(value)}, allowed: {allowed}")

    return Fields(values, fail)


def _family(fields: Fields, tensors: Collection[str]) -> Family:
    model_type = fields.get("model_type")
    family = family_of_config_json(model_type, tensors)
    if family is None:
        raise fields.fail("model_type", model_type, f"one of {', '.join(MODEL_TYPES)}")
    marked = marked_family(tensors)
    if marked is not None and marked is not family:
        raise fields.fail(
            "model_type",
            model_type,
            f"{marked.model_type!r} for weights with {marked.marker} ({marked.name})",
        )
    return family


def _sizes(fields: Fields, family: Family) -> dict[str, Any]:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = heads
    if family.kv_heads is not None and "num_key_value_heads" not in fields.values:
        kv_heads = family.kv_heads
    ffn_size, default = family.ffn_size
    return read_experts(fields, family) | {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "ffn_size": fields.integer(ffn_size, default),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", kv_heads),
        "head_dim": fields.integer(
            "head_dim", family.head_dim or max(hidden // heads, 1)
        ),
        "max_context": read_max_context(fields),
    }


def model_config(
    path: pathlib.Path,
    values: Mapping[str, Any],
    *,
    tensors: Collection[str],
    has_head: bool,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
) -> ModelConfig:
    """Translates config.json.

    Args:
      path: The file, for messages.
      values: Its contents.
      tensors: Names of the weights; they tell NOSA from Llama.
      has_head: The weights have an lm_head; decides on tying where the file does not.
      bos_id: Token put before a plain prompt.
      eos_ids: Tokens that end an answer.

    Returns:
      The configuration.

    Raises:
      CheckpointError: A field is missing, wrong or asks for what is not supported.
    """
    fields = _fields(path, values)
    family = _family(fields, tensors)
    refuse_neutral(fields, family)
    refuse_layer_types(fields)
    name = fields.get("_name_or_path")
    try:
        return ModelConfig(
            name=name if isinstance(name, str) and name else readable(path.parent.name),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=read_rope(fields),
            # The reference's own defaults contradict each other where it is missing.
            tie_embeddings=fields.flag("tie_word_embeddings", not has_head),
            bos_id=bos_id,
            eos_ids=eos_ids,
            **_sizes(fields, family),
            **family.read(fields),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def sparse_config(
    path: str | pathlib.Path, values: object
) -> tuple[SparseConfig, tuple[str, ...]]:
    """Translates the reference's `sparse_config`.

    Its window and topk are in tokens and in blocks on top of the window; ours are in
    blocks, all counted.

    Args:
      path: The file, for messages.
      values: The JSON object.

    Returns:
      The configuration, and the keys that have no meaning here.

    Raises:
      CheckpointError: A value is not allowed.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"{path}: sparse_config = {show(values)}, allowed: an object"
        )
    fields = _fields(path, {"sparse_config": dict(values)}).inner("sparse_config")
    assert fields is not None
    if fields.flag("use_nope", False):
        raise fields.fail("use_nope", True, "false")
    default = SparseConfig()
    block_size = fields.integer("block_size", default.block_size)
    window = fields.integer("window_size", default.local_blocks * block_size)
    if window % block_size:
        raise fields.fail(
            "window_size", window, f"a multiple of block_size = {block_size}"
        )
    local_blocks = window // block_size
    topk = fields.integer("topk", default.largest_budget - default.local_blocks)
    try:
        config = SparseConfig(
            kernel_size=fields.integer("kernel_size", default.kernel_size),
            kernel_stride=fields.integer("kernel_stride", default.kernel_stride),
            block_size=block_size,
            init_blocks=fields.integer("init_blocks", default.init_blocks, 0),
            local_blocks=local_blocks,
            block_budget=topk + local_blocks,
            query_blocks=fields.integer("select_blocks", default.query_blocks, 0),
            dense_len=fields.integer("dense_len", default.dense_len, -1),
            forecast_decode_only=fields.flag("use_q_future_decode_only", False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: sparse_config: {error}") from error
    ignored = sorted(str(key) for key in values if key not in _SPARSE_KEYS)
    return config, tuple(ignored)


def sparse_json(config: SparseConfig) -> dict[str, Any]:
    """Inverse of `sparse_config`, for config.json, which has one budget for all layers.

    Raises:
      ConfigError: If the budgets differ by layer.
    """
    if len(set(config.budgets)) > 1:
        raise ConfigError(
            f"SparseConfig.block_budget={config.block_budget} is not allowed in a "
            "config.json: its format has one number for all layers"
        )
    return {
        "kernel_size": config.kernel_size,
        "kernel_stride": config.kernel_stride,
        "init_blocks": config.init_blocks,
        "block_size": config.block_size,
        "window_size": config.local_blocks * config.block_size,
        "topk": config.largest_budget - config.local_blocks,
        "select_blocks": config.query_blocks,
        "dense_len": config.dense_len,
        "use_q_future_decode_only": config.forecast_decode_only,
    }


def config_json(
    config: ModelConfig, path: pathlib.Path, dtype: str, sparse: SparseConfig | None
) -> dict[str, Any]:
    """Inverse of `model_config`.

    Args:
      config: The model.
      path: The file that will be written, for messages.
      dtype: `float32` or `bfloat16`.
      sparse: Selection settings to keep with it.

    Returns:
      Contents of config.json.

    Raises:
      CheckpointError: No model type has this combination of features.
    """
    family = family_of_model(config)
    if family is None:
        known = [
            f"{' and '.join(sorted(variant)) or 'none'} ({family.name})"
            for family in FAMILIES
            for variant in family.variants
        ]
        raise CheckpointError(
            f"{path}: no model_type has {' and '.join(sorted(variant_of(config)))}; "
            f"allowed: {', '.join(known)}"
        )
    try:
        scaling = rope_json(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "_name_or_path": config.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        # Without a tokenizer nothing else says whether a prompt begins with it.
        "add_bos_token": config.bos_id is not None,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
    }
    values |= family.write(config)
    if scaling is not None:
        values["rope_scaling"] = scaling
    if sparse is not None:
        values["sparse_config"] = sparse_json(sparse)
    return values
