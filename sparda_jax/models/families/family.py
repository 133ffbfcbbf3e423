"""What the files of one kind of model say, and how it is read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparda_jax.config import ModelConfig
from sparda_jax.models.families.fields import Fields

# Flags of ModelConfig that say which parameters a model has.
FLAGS = ("attention_bias", "output_bias", "qk_norm", "key_bias")
BIASES = frozenset({"attention_bias", "output_bias"})
SCALED = "scaled"  # muP scales, which are no flag of their own.
# Of models with experts: that they have them, and one that all tokens share; router
# probabilities that are left as they are.
EXPERT_COUNTS = ("num_experts", "num_local_experts")  # Two names of one setting.
EXPERTS, SHARED, UNNORMALIZED = "experts", "shared_expert", "unnormalized"

# Settings that would change the arithmetic, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "quantization_config": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_shared_experts": (0,),
    "moe_layer_freq": (1,),
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
    "is_causal": (True,),
    "per_layer_config": ({},),
    # Another file of weights than the one that is read.
    "transformers_weights": ("model.safetensors",),
}


def _no_extras(fields: Fields) -> dict[str, Any]:
    return {}


def _plain_json(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """How the files of one kind of model are read and written.

    Attributes:
      name: The family.
      model_type: Of config.json; several families may share one.
      read: From config.json: fields of ModelConfig besides sizes, RoPE and tokens.
        Refuses what the family's files can ask for and this project does not have.
      variants: Sets of `FLAGS` and `SCALED` that a config.json of this family can say;
        none where another family's file says the same.
      write: From a model of one of the variants: entries of config.json besides sizes,
        RoPE and tokens.
      marker: End of a tensor's name by which the family is known among those of the
        same model_type.
      head_dim: Where config.json names none; None is hidden_size / heads.
      kv_heads: Where config.json has no such key; None is one a query head.
      architecture: `general.architecture` of its GGUF files, None if it has none of its
        own.
      permuted: GGUF files store the rows of q and k as neighbouring pairs.
      fixed: Flags that every GGUF file of this family has set.
      optional: Flags that a GGUF file shows by its tensors.
      ffn_size: Key of config.json with the inner width of an MLP, and its default, None
        for one that must be there.
      experts: Experts and those of one token where config.json does not say; None for
        a family without experts.
      stored_names: Name in the family's safetensors files by the table's name, after
        `model.layers.{l}.`, where they differ; `{expert}` stands for a number.
    """

    name: str
    model_type: str
    read: Callable[[Fields], dict[str, Any]] = _no_extras
    variants: tuple[frozenset[str], ...] = ()
    write: Callable[[ModelConfig], dict[str, Any]] = _plain_json
    marker: str | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    architecture: str | None = None
    permuted: bool = False
    fixed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    ffn_size: tuple[str, int | None] = ("intermediate_size", None)
    experts: tuple[int, int] | None = None
    stored_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def variant_of(config: ModelConfig) -> frozenset[str]:
    """Which flags a model has set, and whether it has scales."""
    scales = (config.embed_scale, config.residual_scale, config.logits_divisor)
    flags = {flag for flag in FLAGS if getattr(config, flag)}
    more = {
        SCALED: scales != (1.0, 1.0, 1.0),
        EXPERTS: config.num_experts > 0,
        SHARED: config.shared_ffn_size > 0,
        UNNORMALIZED: not config.normalize_router,
    }
    return frozenset(flags | {name for name, has in more.items() if has})


def read_experts(fields: Fields, family: Family) -> dict[str, int]:
    """How many experts a layer has, and a token."""
    if family.experts is None:
        return {}
    held, used = family.experts
    counts = [fields.integer(key) for key in EXPERT_COUNTS if fields.has(key)]
    if counts[1:] and counts[0] != counts[1]:
        raise fields.fail(
            EXPERT_COUNTS[1], counts[1], f"{EXPERT_COUNTS[0]}, {counts[0]}"
        )
    return {
        "num_experts": counts[0] if counts else held,
        "experts_per_token": fields.integer("num_experts_per_tok", used),
    }


def read_biases(fields: Fields) -> dict[str, Any]:
    """`attention_bias`: biases of q, k, v and of the output projection."""
    return dict.fromkeys(BIASES, fields.flag("attention_bias", False))


def refuse_neutral(fields: Fields, family: Family) -> None:
    """Refuses settings of other families that would change the arithmetic."""
    own = () if family.experts is None else EXPERT_COUNTS
    for key, neutral in _NEUTRAL.items():
        value = None if key in own else fields.get(key)
        # 1 == True in Python, not in JSON.
        same = [type(value) is type(x) or isinstance(value, float) for x in neutral]
        ok = any(value == x for x, fits in zip(neutral, same, strict=True) if fits)
        if value is not None and not ok:
            wanted = " or ".join(map(repr, neutral)) or "not there"
            raise fields.fail(key, value, f"{wanted}; nothing else is supported")


def refuse_layer_types(fields: Fields) -> None:
    """Refuses layers that are not plain full attention."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return
    listed = kinds if isinstance(kinds, list) else [kinds]
    other = [kind for kind in listed if kind != "full_attention"]
    if other:
        raise fields.fail("layer_types", other[0], "'full_attention' in all layers")
    layers = fields.integer("num_hidden_layers")
    if len(listed) != layers:
        raise fields.fail("layer_types", listed, f"one type a layer ({layers})")


def refuse_window(fields: Fields, window: object) -> None:
    """Refuses a sliding window that a sequence can outgrow.

    Args:
      fields: Of config.json.
      window: `sliding_window`, None if every token sees all before it.
    """
    if window is None:
        return
    longest = fields.integer("max_position_embeddings")
    whole = isinstance(window, int) and not isinstance(window, bool)
    if not whole or window < longest:
        raise fields.fail(
            "sliding_window",
            window,
            f"null, or at least max_position_embeddings = {longest}: sliding windows "
            "are not supported",
        )
