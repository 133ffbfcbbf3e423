"""The parameters of a decoder: one table, from which all that is said of them follows.

A row is one tensor of a checkpoint: its shape, its names in both kinds of files, and
the array of the decoder that it becomes or is a part of. Layouts of files, abstract and
random weights, parameter counts and sharding read the table.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Literal

from sparda_jax.config import ModelConfig
from sparda_jax.mesh import MODEL as MODEL_AXIS

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of a checkpoint.

    Attributes:
      array: The decoder's array (`DecoderLayer`, `Decoder`). Tensors of one array stand
        one after the other in the table and are joined along their outputs.
      shape: As stored, outputs before inputs; letters of `sizes`. Experts' tensors
        are one, with the experts first, however a file holds them.
      hf: Name in a safetensors file, for a layer's after `model.layers.{l}.`.
      gguf: Name in a GGUF file, for a layer's after `blk.{l}.`; None: it has none.
      flag: The attribute of `ModelConfig` by which a model has it; None: every model
        has it.
      shard: Which axis devices divide: a linear's inputs or outputs.
      rotary: Its rows are those of heads that RoPE turns.
    """

    array: str
    shape: tuple[str, ...]
    hf: str
    gguf: str | None
    flag: str | None = None
    shard: Literal["inputs", "outputs"] | None = None
    rotary: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is stored [out, in] and used [in, out]."""
        return len(self.shape) >= 2 and "V" not in self.shape

    @property
    def of_experts(self) -> bool:
        """Whether every expert has its own."""
        return len(self.shape) == 3


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

MODEL = (
    Parameter("embedding", ("V", "D"), EMBEDDING, "token_embd.weight"),
    Parameter("final_norm", ("D",), FINAL_NORM, "output_norm.weight"),
    Parameter("head", ("V", "D"), HEAD, "output.weight"),
)


def _linear(
    array: str,
    shape: tuple[str, ...],
    hf: str,
    gguf: str | None = None,
    shard: Literal["inputs", "outputs"] | None = None,
    *,
    rotary: bool = False,
    flag: str | None = None,
) -> Parameter:
    named = None if gguf is None else f"{gguf}.weight"
    return Parameter(array, shape, f"{hf}.weight", named, flag, shard, rotary)


def _vector(
    array: str,
    size: str,
    hf: str,
    gguf: str | None,
    flag: str | None = None,
    *,
    rotary: bool = False,
) -> Parameter:
    return Parameter(array, (size,), hf, gguf, flag, rotary=rotary)


_Q, _K, _V = (f"self_attn.{part}_proj" for part in "qkv")
_OUT = "self_attn.o_proj"

_EXPERTS, _SHARED, _IN = "mlp.experts", "mlp.shared_expert", ("E", "F", "D")

_dense = functools.partial(_linear, flag="dense_mlp")
_expert = functools.partial(_linear, flag="num_experts")
_shared = functools.partial(_linear, flag="shared_ffn_size")

# The order is that of files we write and of the seeds of random weights.
LAYER = (
    _vector("attention_norm", "D", "input_layernorm.weight", "attn_norm.weight"),
    _linear("qkv", ("NH", "D"), _Q, "attn_q", "outputs", rotary=True),
    _linear("qkv", ("KH", "D"), _K, "attn_k", "outputs", rotary=True),
    _linear("qkv", ("KH", "D"), _V, "attn_v", "outputs"),
    _linear("out", ("D", "NH"), _OUT, "attn_output", "inputs"),
    _vector("mlp_norm", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _dense("gate_up", ("F", "D"), "mlp.gate_proj", "ffn_gate", "outputs"),
    _dense("gate_up", ("F", "D"), "mlp.up_proj", "ffn_up", "outputs"),
    _dense("down", ("D", "F"), "mlp.down_proj", "ffn_down", "inputs"),
    _expert("router", ("E", "D"), "mlp.gate", "ffn_gate_inp", "outputs"),
    _expert("expert_gate_up", _IN, f"{_EXPERTS}.gate_proj", "ffn_gate_exps", "outputs"),
    _expert("expert_gate_up", _IN, f"{_EXPERTS}.up_proj", "ffn_up_exps", "outputs"),
    _expert(
        "expert_down",
        ("E", "D", "F"),
        f"{_EXPERTS}.down_proj",
        "ffn_down_exps",
        "inputs",
    ),
    _shared("shared_gate_up", ("S", "D"), f"{_SHARED}.gate_proj", shard="outputs"),
    _shared("shared_gate_up", ("S", "D"), f"{_SHARED}.up_proj", shard="outputs"),
    _shared("shared_down", ("D", "S"), f"{_SHARED}.down_proj", shard="inputs"),
    _shared("shared_gate", ("1", "D"), "mlp.shared_expert_gate", shard="inputs"),
    _vector(
        "qkv_bias", "NH", f"{_Q}.bias", "attn_q.bias", "attention_bias", rotary=True
    ),
    _vector(
        "qkv_bias", "KH", f"{_K}.bias", "attn_k.bias", "attention_bias", rotary=True
    ),
    _vector("qkv_bias", "KH", f"{_V}.bias", "attn_v.bias", "attention_bias"),
    _vector("out_bias", "D", f"{_OUT}.bias", "attn_output.bias", "output_bias"),
    _vector("q_norm", "H", "self_attn.q_norm.weight", "attn_q_norm.weight", "qk_norm"),
    _vector("k_norm", "H", "self_attn.k_norm.weight", "attn_k_norm.weight", "qk_norm"),
    _vector("key_bias_scale", "K", "self_attn.A", None, "key_bias"),
    _linear(
        "key_bias_delta",
        ("K", "KH"),
        "self_attn.delta",
        None,
        "inputs",
        flag="key_bias",
    ),
)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of the table.

    V vocabulary, D hidden, F ffn, N·H, K·H, H, K, E experts, S ffn of the shared one.
    """
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.ffn_size,
        "NH": config.num_heads * config.head_dim,
        "KH": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
        "K": config.num_kv_heads,
        "E": config.num_experts,
        "S": config.shared_ffn_size,
        "1": 1,
    }


def model_parameters(config: ModelConfig) -> list[Parameter]:
    """Tensors outside of the layers; a tied model has no head."""
    return [p for p in MODEL if p.hf != HEAD or not config.tie_embeddings]


def layer_parameters(config: ModelConfig) -> list[Parameter]:
    """Tensors of one layer."""
    return [p for p in LAYER if p.flag is None or getattr(config, p.flag)]


def stored_shape(parameter: Parameter, config: ModelConfig) -> Shape:
    """Shape of a tensor in a checkpoint."""
    by_letter = sizes(config)
    return tuple(by_letter[letter] for letter in parameter.shape)


def layer_name(layer: int, rest: str) -> str:
    """Name of a tensor of one layer, such as `self_attn.q_proj.weight`."""
    return f"model.layers.{layer}.{rest}"


def base_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yields name and shape of every tensor of the base model, as safetensors has it.

    It is a generator because `num_layers` may come from a damaged file: the consumer
    stops at the first layer that is not there.
    """
    for parameter in model_parameters(config):
        yield parameter.hf, stored_shape(parameter, config)
    shapes = [(p.hf, stored_shape(p, config)) for p in layer_parameters(config)]
    for layer in range(config.num_layers):
        for rest, shape in shapes:
            yield layer_name(layer, rest), shape


def joined(
    parameters: Iterable[Parameter],
) -> Iterator[tuple[str, list[Parameter]]]:
    """Yields each array of the decoder with the tensors that it is made of."""
    for array, parts in itertools.groupby(parameters, key=lambda p: p.array):
        yield array, list(parts)


def _joined_shape(parts: list[Parameter], config: ModelConfig) -> Shape:
    shapes = [stored_shape(part, config) for part in parts]
    if not parts[0].is_linear:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])
    *experts, _, inputs = shapes[0]
    return (*experts, inputs, sum(shape[-2] for shape in shapes))


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of one `DecoderLayer`'s arrays; linears are [in, out]."""
    return {
        array: _joined_shape(parts, config)
        for array, parts in joined(layer_parameters(config))
    }


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the arrays outside of the layers."""
    return {p.array: stored_shape(p, config) for p in model_parameters(config)}


def forecast_shape(config: ModelConfig) -> Shape:
    """Shape [D, K·R·H] of one Forecast head."""
    queries = config.num_kv_heads * config.forecast_queries
    return config.hidden_size, queries * config.head_dim


@functools.lru_cache(64)
def num_parameters(config: ModelConfig) -> int:
    """Parameters of the base model, Forecast heads not counted."""
    outside = sum(math.prod(shape) for shape in model_shapes(config).values())
    a_layer = sum(math.prod(shape) for shape in layer_shapes(config).values())
    return outside + config.num_layers * a_layer


def num_active_parameters(config: ModelConfig, experts: float | None = None) -> int:
    """Parameters of the base model that tokens use.

    Args:
      config: The model.
      experts: Experts of a layer that are in use; None for those of one token.
    """
    if config.dense_mlp:
        return num_parameters(config)
    used = config.experts_per_token if experts is None else experts
    held = sum(
        math.prod(stored_shape(part, config))
        for part in layer_parameters(config)
        if part.of_experts
    )
    idle = 1 - used / config.num_experts
    return num_parameters(config) - round(config.num_layers * held * idle)


def num_forecast_parameters(config: ModelConfig) -> int:
    """Parameters of the Forecast heads, one a layer."""
    return config.num_layers * math.prod(forecast_shape(config))


# The axis of a mesh over which devices divide a dimension (`models.sharding`).
MESH_AXES = {
    "V": MODEL_AXIS,
    "D": None,
    "F": MODEL_AXIS,
    "NH": MODEL_AXIS,
    "KH": MODEL_AXIS,
    "H": None,
    "K": MODEL_AXIS,
    "E": None,
    "S": MODEL_AXIS,
    "1": None,
}


def _parts_of(array: str) -> list[Parameter]:
    return [p for p in (*MODEL, *LAYER) if p.array == array]


def split_axis(array: str) -> int | None:
    """The axis of a decoder's array that devices of a mesh divide, None for none."""
    parts = _parts_of(array)
    if not parts:
        return None
    letters = list(parts[0].shape)
    if parts[0].is_linear:
        letters[-2:] = letters[:-3:-1]
    divided = [axis for axis, x in enumerate(letters) if MESH_AXES[x] is not None]
    return divided[0] if divided else None


def split_parts(array: str, config: ModelConfig) -> list[int]:
    """Widths of the tensors that are joined along an array's divided axis."""
    parts = _parts_of(array)
    if len(parts) == 1:
        return [0]
    outputs = -2 if parts[0].is_linear else 0
    return [stored_shape(part, config)[outputs] for part in parts]


def shard_axes(array: str) -> tuple[int, ...]:
    """Axes of a `DecoderLayer`'s array that devices may divide, the best one first."""
    shard = next(p.shard for p in LAYER if p.array == array)
    if shard is None:
        return ()
    if any(p.of_experts for p in LAYER if p.array == array):
        return (0, 1, 2) if shard == "inputs" else (0, 2, 1)
    return (0, 1) if shard == "inputs" else (1, 0)
