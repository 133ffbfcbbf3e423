"""GGUF files of architecture llama or qwen2: configuration, tensors and tokenizer.

The converter of architecture llama stores the rows of q and k interleaved, as pairs of
neighbouring rows are rotated together there; this project's RoPE pairs row k with row
k + H/2 of a head. The rows are put back here. Files of qwen2 are not permuted.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.dequantize import can_dequantize, dequantize
from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.gguf_header import GGUFHeader, TensorInfo, read_header
from sparda_jax.checkpoint.tensors import TensorLoader
from sparda_jax.checkpoint.tokenizer import Tokenizer, tokenizer_from_gguf
from sparda_jax.config import ConfigError, ModelConfig, RopeConfig

_MAX_INTEGER = 2**31 - 1  # Sizes and positions are int32 on the device.

ARCHITECTURES = ("llama", "qwen2")

_TOP = {
    "token_embd.weight": layout.EMBEDDING,
    "output_norm.weight": layout.FINAL_NORM,
    "output.weight": layout.HEAD,
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# Frequency divisors, which become part of the configuration.
_ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
# What would change the arithmetic and is not in ModelConfig for these architectures,
# with the value at which it changes nothing.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": None,
    "attention.logit_softcapping": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "use_parallel_residual": False,
    "attention.causal": True,
}

_Types = gguf.GGMLQuantizationType
_PLAIN = {
    _Types.F32: np.dtype("<f4"),
    _Types.F16: np.dtype("<f2"),
    _Types.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Loader of one tensor of a GGUF file.

    Attributes:
      data: Memory map of the whole file, uint8.
      info: Where the tensor lies.
      rows: For a permuted tensor, the stored row of each row.
    """

    data: np.ndarray
    info: TensorInfo
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.info.shape

    def _stored(self) -> np.ndarray:
        """[rows, bytes of a row], a view of the file; a vector's elements are rows.

        A quantised vector is one row.
        """
        raw = self.data[self.info.offset : self.info.offset + self.info.nbytes]
        if len(self.shape) > 1:
            return raw.reshape(math.prod(self.shape[:-1]), -1)
        return raw.reshape(self.shape[0] if self.info.kind in _PLAIN else 1, -1)

    def _decode(self, raw: np.ndarray) -> np.ndarray:
        plain = _PLAIN.get(self.info.kind)
        if plain is not None:
            return np.ascontiguousarray(raw).view(plain)
        return dequantize(raw, self.info.kind)

    def __call__(self) -> np.ndarray:
        """Returns the array, float32 unless the file holds float16 or bfloat16."""
        stored = self._stored()
        if self.rows is not None:
            stored = stored[self.rows]
        return self._decode(stored).reshape(self.shape)

    def sample(self, indices: np.ndarray) -> np.ndarray:
        """Returns the float32 elements at flat `indices`."""
        stored = self._stored()
        per_row = math.prod(self.shape) // stored.shape[0]
        row, column = np.divmod(indices, per_row)
        if self.rows is not None:
            row = self.rows[row]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.info.kind]
        blocks = stored.reshape(-1, block_bytes)
        block, inner = np.divmod(row * per_row + column, per_block)
        decoded = self._decode(blocks[block]).reshape(len(indices), per_block)
        return decoded[np.arange(len(indices)), inner].astype(np.float32)


def _unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Stored row of each row: (heads, H/2, 2) to (heads, 2, H/2)."""
    stored = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


class _Fields:
    """Typed, checked access to the metadata of one architecture."""

    def __init__(self, header: GGUFHeader, arch: str) -> None:
        self._header = header
        self._arch = arch

    def fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self._header.path}: GGUF {self._arch}.{key} = {show(value)}, "
            f"allowed: {allowed}"
        )

    def get(self, key: str) -> Any:
        return self._header.metadata.get(f"{self._arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # One number a layer, the same for all.
        if value is None and default is not None:
            return default
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 0 < value <= _MAX_INTEGER:
            raise self.fail(key, value, f"an integer from 1 to {_MAX_INTEGER}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self.fail(key, value, "a finite number above 0")
        # The file holds float32; its shortest decimal is what was meant (1e-05).
        return float(str(np.float32(value)))


def _read_vector(
    header: GGUFHeader, data: np.ndarray, name: str, size: int
) -> tuple[float, ...]:
    info = header.tensors[name]
    layout.check_shape(header.path, name, info.shape, (size,))
    if info.kind not in _PLAIN:
        raise CheckpointError(
            f"{header.path}: tensor {name} has type {info.kind.name}, allowed: F32, "
            "F16, BF16"
        )
    return tuple(GGUFTensor(data, info)().astype(np.float64).tolist())


def _rope(
    header: GGUFHeader, fields: _Fields, data: np.ndarray, head_dim: int
) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    context = fields.integer("context_length")
    kind = fields.get("rope.scaling.type")
    if kind is None:
        kind = "linear" if fields.get("rope.scaling.factor") is not None else "none"
    if not isinstance(kind, str):
        raise fields.fail("rope.scaling.type", kind, "a string")
    original = fields.integer("rope.scaling.original_context_length", context)
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    has_freqs = "rope_freqs.weight" in header.tensors
    has_lists = [name in header.tensors for name in _ROPE_TENSORS[1:]]
    if has_freqs and (any(has_lists) or kind != "none"):
        raise fields.fail(
            "rope.scaling.type", kind, "'none' in a file with rope_freqs.weight"
        )
    if has_freqs:
        # Llama 3 files hold their band scaling as ready divisors of the frequencies:
        # the same arithmetic as LongRoPE with one list for every length.
        divisors = _read_vector(header, data, "rope_freqs.weight", head_dim // 2)
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
            raise CheckpointError(
                f"{header.path}: GGUF longrope needs the tensors "
                "rope_factors_long.weight and rope_factors_short.weight"
            )
        long_list, short_list = (
            _read_vector(header, data, name, head_dim // 2)
            for name in _ROPE_TENSORS[1:]
        )
        return RopeConfig(
            kind="longrope",
            theta=theta,
            original_max=original,
            short_factors=short_list,
            long_factors=long_list,
            attention_factor=attention,
            longrope_max=context,
        )
    factor = fields.number(
        "rope.scaling.factor", fields.number("rope.scale_linear", 1.0)
    )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor)
    if kind == "yarn":
        magnitude = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return RopeConfig(
            kind="yarn",
            theta=theta,
            factor=factor,
            original_max=original,
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=magnitude,
        )
    raise fields.fail(
        "rope.scaling.type", kind, "'none', 'linear', 'yarn' or 'longrope'"
    )


def _config(
    header: GGUFHeader, arch: str, data: np.ndarray, tokenizer: Tokenizer | None
) -> ModelConfig:
    fields = _Fields(header, arch)
    for key, neutral in _NEUTRAL.items():
        value = fields.get(key)
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
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: tensor token_embd.weight is missing")
    vocab = embedding.shape[0]
    if fields.integer("vocab_size", vocab) != vocab:
        raise fields.fail(
            "vocab_size", fields.get("vocab_size"), f"token_embd.weight's {vocab} rows"
        )
    if tokenizer is not None and tokenizer.vocab_size > vocab:
        raise CheckpointError(
            f"{header.path}: GGUF tokenizer.ggml.tokens has {tokenizer.vocab_size} "
            f"entries, allowed: at most token_embd.weight's {vocab} rows"
        )
    name = header.metadata.get("general.name")
    biases = [f"blk.0.attn_{x}.bias" in header.tensors for x in "qkv"]
    add_bos = tokenizer is not None and tokenizer.add_bos
    return ModelConfig(
        name=name if isinstance(name, str) and name else header.path.stem,
        vocab_size=vocab,
        hidden_size=hidden,
        ffn_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(header, fields, data, head_dim),
        tie_embeddings="output.weight" not in header.tensors,
        attention_bias=any(biases),
        bos_id=tokenizer.bos_id if tokenizer is not None and add_bos else None,
        eos_ids=tokenizer.eos_ids if tokenizer is not None else (),
    )


def _hf_name(path: pathlib.Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if prefix == "blk" and rest in _LAYER and number.isascii() and number.isdigit():
        if number == str(int(number[:9])):
            return layout.layer_name(int(number), _LAYER[rest])
    raise CheckpointError(
        f"{path}: tensor {show(name)} is not one of a supported model: allowed are "
        f"{', '.join((*_TOP, *_ROPE_TENSORS))} and blk.N.* with "
        f"{', '.join(_LAYER)}"
    )


def _loaders(
    header: GGUFHeader, arch: str, config: ModelConfig, data: np.ndarray
) -> dict[str, TensorLoader]:
    infos = {
        _hf_name(header.path, name): info
        for name, info in header.tensors.items()
        if name not in _ROPE_TENSORS
    }
    shapes = {name: info.shape for name, info in infos.items()}
    names = layout.check_base(header.path, config, shapes)
    extra = sorted(set(infos) - set(names))
    if extra:
        raise CheckpointError(
            f"{header.path}: tensor {extra[0]} is not part of this model, which has "
            f"{config.num_layers} layers"
        )
    for kind, name in {infos[name].kind: name for name in names}.items():
        if kind not in _PLAIN and not can_dequantize(kind):
            raise CheckpointError(
                f"{header.path}: tensor {name} has type {kind.name}, which cannot be "
                "dequantised; allowed: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, "
                "Q2_K to Q6_K, IQ and TQ types that the gguf package knows"
            )
    rows = {}
    if arch == "llama":
        rows = {
            "q_proj": _unpermuted_rows(config.num_heads, config.head_dim),
            "k_proj": _unpermuted_rows(config.num_kv_heads, config.head_dim),
        }
    return {
        name: GGUFTensor(data, infos[name], rows.get(name.split(".")[-2]))
        for name in names
    }


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds; see `CheckpointSource`."""

    config: ModelConfig
    tensors: Mapping[str, TensorLoader]
    tokenizer: Tokenizer | None


def read_gguf(path: str | os.PathLike) -> GGUFModel:
    """Opens a GGUF file; the tensors are read when their loaders are called.

    Args:
      path: The file.

    Returns:
      Its configuration, loaders by Hugging Face name and tokenizer (None if the file
      has none).

    Raises:
      CheckpointError: The file is damaged or holds what is not supported.
    """
    header = read_header(path)
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: GGUF general.architecture = {show(arch)}, allowed: "
            f"{', '.join(ARCHITECTURES)}"
        )
    parts = header.metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise CheckpointError(
            f"{header.path}: GGUF split.count = {show(parts)}, allowed: 1; merge the "
            "parts into one file first"
        )
    data = np.asarray(np.memmap(header.path, np.uint8, "r"))
    tokenizer = tokenizer_from_gguf(header)
    try:
        config = _config(header, arch, data, tokenizer)
    except ConfigError as error:
        raise CheckpointError(f"{header.path}: {error}") from error
    return GGUFModel(config, _loaders(header, arch, config, data), tokenizer)
