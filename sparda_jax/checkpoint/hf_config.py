"""Hugging Face's config.json to ModelConfig and SparseConfig, and back.

What a file asks for and this project does not have is refused by name: a setting that
is silently dropped gives a model that answers, but wrongly.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.config import ConfigError, ModelConfig, RopeConfig, SparseConfig

_MAX_INTEGER = 2**31 - 1  # Sizes and positions are int32 on the device.

MODEL_TYPES = ("llama", "qwen2", "qwen3", "minicpm")

# Settings that would change the arithmetic, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "parallel_attn": (False,),
    "rope_interleave": (False,),
    "attn_output_gate": (False,),
}
# Keys of rope_scaling by kind, besides the kind itself and rope_theta.
_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
    "longrope": frozenset(
        {
            "short_factor",
            "long_factor",
            "original_max_position_embeddings",
            "factor",
            "attention_factor",
        }
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
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


class _Fields:
    """Typed access to one JSON object."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any], at: str = ""):
        self.path = path
        self.values = values
        self.at = at

    def fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.at}{key} = {show(value)}, allowed: {allowed}"
        )

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= _MAX_INTEGER:
            raise self.fail(key, value, f"an integer from {least} to {_MAX_INTEGER}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Integers of JSON have no bound; one that is no float is no setting either.
        if not number or not 0 < value <= 1e30:
            raise self.fail(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.values.get(key)
        if not isinstance(values, list):
            raise self.fail(key, values, "a list of numbers")
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= 1e30:
                raise self.fail(key, value, "a list of finite numbers above 0")
        return tuple(float(value) for value in values)

    def inner(self, key: str) -> "_Fields | None":
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, dict):
            raise self.fail(key, values, "a JSON object")
        return _Fields(self.path, values, f"{self.at}{key}.")


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    for key, neutral in _NEUTRAL.items():
        value = fields.values.get(key)
        if value is not None and value not in neutral:
            wanted = " or ".join(map(repr, neutral)) or "not there"
            raise fields.fail(key, value, f"{wanted}; nothing else is supported")
    if model_type != "qwen2" and fields.flag("attention_bias", False):
        raise fields.fail(
            "attention_bias", True, "false: an o_proj bias is not supported"
        )
    kinds = fields.values.get("layer_types")
    if kinds is not None:
        other = (
            [kind for kind in kinds if kind != "full_attention"]
            if (isinstance(kinds, list))
            else [kinds]
        )
        if other:
            raise fields.fail("layer_types", other[0], "'full_attention' in all layers")


def _rope_fields(fields: _Fields) -> tuple[_Fields | None, str]:
    """The object with the rope settings, old style or new, and its kind."""
    new, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")
    scaling = new if new is not None else old
    if scaling is None:
        return None, "default"
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise scaling.fail("rope_type", kind, f"one of {', '.join(_ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.fail(
            "partial_rotary_factor", scaling.values["partial_rotary_factor"], "1"
        )
    for key, value in scaling.values.items():
        if key not in _ROPE_KEYS[kind] | known and value is not None:
            allowed = ", ".join(sorted(_ROPE_KEYS[kind])) or "nothing more"
            raise scaling.fail(
                key if len(key) <= 80 else show(key), value, f"for {kind!r}: {allowed}"
            )
    return scaling, kind


def _longrope_magnitude(
    fields: _Fields, scaling: _Fields, original: int, longest: int
) -> float | None:
    """attention_factor, None where RopeConfig's own rule gives the same."""
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    ratio = longest / original
    factor = scaling.number("factor", ratio)
    if factor != ratio and fields.values.get("model_type") == "minicpm":
        raise scaling.fail(
            "factor",
            factor,
            f"max_position_embeddings/original_max_position_embeddings = {ratio}",
        )
    return None


def _yarn_magnitude(scaling: _Fields, factor: float) -> float | None:
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    if not (scaling.has("mscale") and scaling.has("mscale_all_dim")):
        return None

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(scaling.number("mscale")) / magnitude(
        scaling.number("mscale_all_dim")
    )


def _rope(fields: _Fields, longest: int) -> RopeConfig:
    scaling, kind = _rope_fields(fields)
    theta = fields.number("rope_theta", 10000.0)
    if scaling is None:
        return RopeConfig(theta=theta)
    theta = scaling.number("rope_theta", theta)
    original_key = "original_max_position_embeddings"
    original = scaling.integer(original_key, fields.integer(original_key, longest))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "longrope":
        return RopeConfig(
            kind="longrope",
            theta=theta,
            original_max=original,
            short_factors=scaling.numbers("short_factor"),
            long_factors=scaling.numbers("long_factor"),
            attention_factor=_longrope_magnitude(fields, scaling, original, longest),
            longrope_max=longest,
        )
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor)
    if kind == "llama3":
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=factor,
            original_max=original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    if not scaling.flag("truncate", True):
        raise scaling.fail("truncate", False, "true")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=_yarn_magnitude(scaling, factor),
    )


def _longest(fields: _Fields) -> tuple[int, int]:
    """(max_position_embeddings, longest context).

    YaRN's max_position_embeddings is the length before stretching in the files of
    Qwen, and the one after it in others.
    """
    trained = fields.integer("max_position_embeddings")
    scaling, kind = _rope_fields(fields)
    if kind == "yarn" and scaling is not None:
        original = scaling.integer("original_max_position_embeddings", trained)
        stretched = original * min(scaling.number("factor"), 1e6)
        return trained, max(trained, int(stretched))
    return trained, trained


def model_config(
    path: pathlib.Path,
    values: Mapping[str, Any],
    *,
    has_head: bool,
    has_key_bias: bool,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
) -> ModelConfig:
    """Translates config.json.

    Args:
      path: The file, for messages.
      values: Its contents.
      has_head: The weights have an lm_head; decides on tying where the file does not.
      has_key_bias: The weights have NOSA's A and delta.
      bos_id: Token put before a plain prompt.
      eos_ids: Tokens that end an answer.

    Returns:
      The configuration.

    Raises:
      CheckpointError: A field is missing, wrong or asks for what is not supported.
    """
    fields = _Fields(path, values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise fields.fail("model_type", model_type, f"one of {', '.join(MODEL_TYPES)}")
    if has_key_bias and model_type != "llama":
        raise fields.fail(
            "model_type", model_type, "'llama' for weights with self_attn.A (NOSA)"
        )
    _refuse_unsupported(fields, model_type)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    trained, longest = _longest(fields)
    scales = {}
    if model_type == "minicpm":
        scales = {
            "embed_scale": fields.number("scale_emb"),
            "residual_scale": fields.number("scale_depth") / math.sqrt(layers),
            "logits_divisor": hidden / fields.number("dim_model_base"),
        }
    name = values.get("_name_or_path")
    default_head_dim = 128 if model_type == "qwen3" else max(hidden // heads, 1)
    try:
        return ModelConfig(
            name=name if isinstance(name, str) and name else path.parent.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            ffn_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", default_head_dim),
            max_context=longest,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, trained),
            # The reference's own defaults contradict each other where it is missing.
            tie_embeddings=fields.flag("tie_word_embeddings", not has_head),
            attention_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            key_bias=has_key_bias,
            bos_id=bos_id,
            eos_ids=eos_ids,
            **scales,
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
    fields = _Fields(pathlib.Path(path), values, "sparse_config.")
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
    topk = fields.integer("topk", default.block_budget - default.local_blocks)
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
    """Inverse of `sparse_config`, for config.json."""
    return {
        "kernel_size": config.kernel_size,
        "kernel_stride": config.kernel_stride,
        "init_blocks": config.init_blocks,
        "block_size": config.block_size,
        "window_size": config.local_blocks * config.block_size,
        "topk": config.block_budget - config.local_blocks,
        "select_blocks": config.query_blocks,
        "dense_len": config.dense_len,
        "use_q_future_decode_only": config.forecast_decode_only,
    }


def _rope_json(config: ModelConfig, path: pathlib.Path) -> dict[str, Any] | None:
    rope = config.rope
    if rope.kind == "default":
        return None
    if rope.kind == "longrope":
        if rope.longrope_max not in (None, config.max_context):
            raise CheckpointError(
                f"{path}: rope.longrope_max = {rope.longrope_max}, allowed in a "
                f"config.json: max_context = {config.max_context}"
            )
        values = {
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "original_max_position_embeddings": rope.original_max,
            "attention_factor": rope.attention_factor,
        }
    elif rope.kind == "linear":
        values = {"factor": rope.factor}
    elif rope.kind == "llama3":
        values = {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max,
        }
    else:
        values = {
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    kept = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rope.kind, **kept}


def _exact_operand(want: float, guess: float, compute: Any) -> float:
    """The float near `guess` that `compute` turns into `want` exactly, if there is one.

    Without it, reading a file that was written would give another last bit.
    """
    for candidate in (guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf)):
        if compute(candidate) == want:
            return candidate
    return guess


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
    scaled = (config.embed_scale, config.residual_scale, config.logits_divisor)
    features = {
        "qwen2": config.attention_bias,
        "qwen3": config.qk_norm,
        "minicpm": scaled != (1.0, 1.0, 1.0),
        "llama": config.key_bias,
    }
    used = [name for name, has in features.items() if has]
    if len(used) > 1:
        raise CheckpointError(
            f"{path}: a model with features of {' and '.join(used)} together has no "
            f"model_type; allowed: one of {', '.join(features)}"
        )
    model_type = used[0] if used else "llama"
    values: dict[str, Any] = {
        "model_type": model_type,
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
    if model_type == "minicpm":
        root = math.sqrt(config.num_layers)
        base = _exact_operand(
            config.logits_divisor,
            config.hidden_size / config.logits_divisor,
            lambda value: config.hidden_size / value,
        )
        values |= {
            "scale_emb": config.embed_scale,
            "scale_depth": _exact_operand(
                config.residual_scale,
                config.residual_scale * root,
                lambda value: value / root,
            ),
            "dim_model_base": int(base) if base == int(base) else base,
        }
    else:
        values |= {"attention_bias": config.attention_bias, "mlp_bias": False}
    scaling = _rope_json(config, path)
    if scaling is not None:
        values["rope_scaling"] = scaling
    if sparse is not None:
        values["sparse_config"] = sparse_json(sparse)
    return values
