"""GGUF files: configuration, tensors and tokenizer.

The converter of some families (`Family.permuted`) stores the rows of q and k
interleaved, as pairs of neighbouring rows are rotated together there; this project's
RoPE pairs row k with row k + H/2 of a head. The rows are put back here.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.dequantize import can_dequantize, dequantized_types
from sparda_jax.checkpoint.errors import (
    CheckpointError,
    UnsupportedTokenizer,
    readable,
    show,
)
from sparda_jax.checkpoint.gguf_header import GGUFHeader, read_header
from sparda_jax.checkpoint.gguf_rope import ROPE_TENSORS, read_rope
from sparda_jax.checkpoint.gguf_split import read_parts
from sparda_jax.checkpoint.gguf_tensor import PLAIN, GGUFTensor
from sparda_jax.checkpoint.tensors import TensorLoader
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checkpoint.tokenizers.gguf import (
    GGUFTokens,
    gguf_tokens,
    tokenizer_from_gguf,
)
from sparda_jax.config import ConfigError, ModelConfig
from sparda_jax.models.families import ARCHITECTURES, family_of_gguf
from sparda_jax.models.families.family import Family
from sparda_jax.models.families.fields import Fields
from sparda_jax.models.spec import LAYER, MODEL, layer_name

_TOP = {p.gguf: p.hf for p in MODEL}
_LAYER = {p.gguf: p.hf for p in LAYER if p.gguf is not None}
_ROTARY = {p.hf: p.shape[0] for p in LAYER if p.rotary}
# What would change the arithmetic and is not in ModelConfig for these architectures,
# with the value at which it changes nothing.
_OF_EXPERTS = ("expert_count", "expert_used_count")
_NEUTRAL = {
    **dict.fromkeys(_OF_EXPERTS, 0),
    "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 1,  # Softmax.
    "expert_group_count": None,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": None,
    "attention.temperature_scale": None,
    "attention.logit_softcapping": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "use_parallel_residual": False,
    "attention.causal": True,
}


def _unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Stored row of each row: (heads, H/2, 2) to (heads, 2, H/2)."""
    stored = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _plain(value: Any) -> Any:
    """A value as it was meant."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()  # One number a layer, the same for all.
    if isinstance(value, float):
        # The file holds float32; its shortest decimal is what was meant (1e-05).
        return float(str(np.float32(value)))
    return value


def _fields(header: GGUFHeader, arch: str) -> Fields:
    """The metadata of the architecture, without its prefix."""

    def fail(key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{header.path}: GGUF {arch}.{key} = {show(value)}, allowed: {allowed}"
        )

    prefix = f"{arch}."
    values = {
        key.removeprefix(prefix): _plain(value)
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    return Fields(values, fail)


def _vocabulary(
    header: GGUFHeader,
    fields: Fields,
    tensors: Mapping[str, GGUFTensor],
    tokens: GGUFTokens | None,
) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: tensor token_embd.weight is missing")
    rows = embedding.shape[0]
    if fields.integer("vocab_size", rows) != rows:
        raise fields.fail(
            "vocab_size", fields.get("vocab_size"), f"token_embd.weight's {rows} rows"
        )
    if tokens is not None and len(tokens.tokens) > rows:
        raise CheckpointError(
            f"{header.path}: GGUF tokenizer.ggml.tokens has {len(tokens.tokens)} "
            f"entries, allowed: at most token_embd.weight's {rows} rows"
        )
    return rows


def _flags(family: Family, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """Flags of ModelConfig, by the family and by the tensors of layer 0."""
    shown = {
        p.flag
        for p in LAYER
        if p.flag in family.optional and f"blk.0.{p.gguf}" in tensors
    }
    return {flag: True for flag in (*family.fixed, *shown) if flag is not None}


def _config(
    header: GGUFHeader,
    family: Family,
    tensors: Mapping[str, GGUFTensor],
    tokens: GGUFTokens | None,
    add_bos: bool,
) -> ModelConfig:
    assert family.architecture is not None
    fields = _fields(header, family.architecture)
    experts: dict[str, Any] = {}
    if family.experts is not None:
        experts = {
            "num_experts": fields.integer("expert_count"),
            "experts_per_token": fields.integer("expert_used_count"),
        }
    for key, neutral in _NEUTRAL.items():
        value = None if experts and key in _OF_EXPERTS else fields.get(key)
        if value is not None and (isinstance(value, np.ndarray) or value != neutral):
            raise fields.fail(key, value, "not there: it is not supported")
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.fail(key, fields.get(key), f"the head dim, {head_dim}")
    if head_dim % 2:
        raise fields.fail("attention.key_length", head_dim, "an even number")
    name = header.metadata.get("general.name")
    return ModelConfig(
        name=name if isinstance(name, str) and name else readable(header.path.stem),
        vocab_size=_vocabulary(header, fields, tensors, tokens),
        hidden_size=hidden,
        ffn_size=fields.integer(
            "expert_feed_forward_length", fields.integer("feed_forward_length")
        ),
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=read_rope(fields, tensors, head_dim),
        tie_embeddings="output.weight" not in tensors,
        bos_id=tokens.bos_id if tokens is not None and add_bos else None,
        eos_ids=tokens.eos_ids if tokens is not None else (),
        **experts,
        **_flags(family, tensors),
    )


def _hf_name(path: pathlib.Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if prefix == "blk" and rest in _LAYER and number.isascii() and number.isdigit():
        if number == str(int(number[:9])):
            return layer_name(int(number), _LAYER[rest])
    raise CheckpointError(
        f"{path}: tensor {show(name)} is not one of a supported model: allowed are "
        f"{', '.join(map(str, (*_TOP, *ROPE_TENSORS)))} and blk.N.* with "
        f"{', '.join(_LAYER)}"
    )


def _loaders(
    header: GGUFHeader,
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, GGUFTensor],
) -> dict[str, TensorLoader]:
    by_name = {
        _hf_name(tensor.path, name): tensor
        for name, tensor in tensors.items()
        if name not in ROPE_TENSORS
    }
    shapes = {name: tensor.shape for name, tensor in by_name.items()}
    names = layout.check_base(header.path, config, shapes)
    extra = sorted(set(by_name) - set(names))
    if extra:
        raise CheckpointError(
            f"{header.path}: tensor {extra[0]} is not part of this model, which has "
            f"{config.num_layers} layers"
        )
    for kind, name in {by_name[name].kind: name for name in names}.items():
        if kind not in PLAIN and not can_dequantize(kind):
            raise CheckpointError(
                f"{by_name[name].path}: tensor {name} has type {kind.name}, which "
                "cannot be dequantised; allowed: "
                f"{', '.join(t.name for t in dequantized_types())}"
            )
    rows = {}
    if family.permuted:
        heads = {"NH": config.num_heads, "KH": config.num_kv_heads}
        rows = {
            name: _unpermuted_rows(heads[letter], config.head_dim)
            for name, letter in _ROTARY.items()
        }
    return {
        name: dataclasses.replace(
            by_name[name], rows=rows.get(name.removeprefix("model.").split(".", 2)[-1])
        )
        for name in names
    }


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds; see `CheckpointSource`."""

    config: ModelConfig
    tensors: Mapping[str, TensorLoader]
    tokenizer: Tokenizer | None
    tokenizer_error: str | None


def read_gguf(path: str | os.PathLike) -> GGUFModel:
    """Opens a GGUF file; the tensors are read when their loaders are called.

    Args:
      path: The file; any part of a model that is split into several.

    Returns:
      Its configuration, loaders by Hugging Face name and tokenizer (None if the file
      has none).

    Raises:
      CheckpointError: The file is damaged or holds what is not supported.
    """
    header, tensors = read_parts(read_header(path))
    arch = header.metadata.get("general.architecture")
    many = header.metadata.get(f"{arch}.expert_count", 0)
    family = family_of_gguf(arch, experts=many not in (0, None))
    if family is None:
        raise CheckpointError(
            f"{header.path}: GGUF general.architecture = {show(arch)}, allowed: "
            f"{', '.join(ARCHITECTURES)}"
        )
    tokens, tokenizer, reason = gguf_tokens(header), None, None
    try:
        tokenizer = tokenizer_from_gguf(header)
    except UnsupportedTokenizer as error:
        reason = str(error)
    if tokenizer is not None:
        add_bos = tokenizer.add_bos
    else:
        add_bos = tokens is not None and tokens.add_bos is True
    try:
        config = _config(header, family, tensors, tokens, add_bos)
    except ConfigError as error:
        raise CheckpointError(f"{header.path}: {error}") from error
    loaders = _loaders(header, family, config, tensors)
    return GGUFModel(config, loaders, tokenizer, reason)
