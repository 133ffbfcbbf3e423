"""The decoder: one module for every supported model, its weights and its layer body.

Weights are stored in one of two ways, and everything else is written once:

  stacked     one `DecoderLayer` whose arrays carry a leading axis L; `lax.scan` runs it
  per layer   L separate `DecoderLayer`s; a Python loop unrolls them

Stacked storage compiles in constant time and suits training and long prefills. A scan
copies each layer's slice of the stack first, so per-layer storage is faster where a
step is bound by memory, as in decode.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparda_jax.config import ForecastReads, ModelConfig
from sparda_jax.mesh import MODEL
from sparda_jax.models.forecast import Forecast
from sparda_jax.models.int8_weight import Int8Weight, as_array
from sparda_jax.models.layers import rms_norm
from sparda_jax.models.vocabulary import first_token, of_all_devices

Storage = Literal["stacked", "per_layer"]


class DecoderLayer(nnx.Module):
    """Weights of one decoder layer, or of all of them with a leading axis L.

    Linear weights are [in, out], those of experts [E, in, out]; Q|K|V and gate|up are
    fused. A layer has one MLP, or a router and experts.
    """

    def __init__(self, weights: dict[str, Array]):
        """Takes the arrays by the names of `spec.layer_shapes`."""
        self.attention_norm = nnx.Param(weights["attention_norm"])
        self.qkv = nnx.Param(weights["qkv"])
        self.out = nnx.Param(weights["out"])
        self.mlp_norm = nnx.Param(weights["mlp_norm"])
        self.gate_up = _optional(weights, "gate_up")
        self.down = _optional(weights, "down")
        self.router = _optional(weights, "router")
        self.expert_gate_up = _optional(weights, "expert_gate_up")
        self.expert_down = _optional(weights, "expert_down")
        self.shared_gate_up = _optional(weights, "shared_gate_up")
        self.shared_down = _optional(weights, "shared_down")
        self.shared_gate = _optional(weights, "shared_gate")
        self.qkv_bias = _optional(weights, "qkv_bias")
        self.out_bias = _optional(weights, "out_bias")
        self.q_norm = _optional(weights, "q_norm")
        self.k_norm = _optional(weights, "k_norm")
        self.key_bias_scale = _optional(weights, "key_bias_scale")
        self.key_bias_delta = _optional(weights, "key_bias_delta")


def _optional(weights: dict[str, Array], name: str) -> nnx.Param | None:
    return nnx.Param(weights[name]) if name in weights else None


class Decoder(nnx.Module):
    """Embedding, layers, final norm, head and, if present, Forecast heads.

    Attributes:
      embedding: [V, D].
      layers: One stacked `DecoderLayer`, or an `nnx.List` of L of them.
      final_norm: [D].
      head: [V, D], or None when tied to the embedding.
      forecast: Forecast heads by consuming layer (see `models.forecast`): an array
        [L, D, K·R·H] or an `nnx.List` of [D, K·R·H]; None when the model has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Float[Array, "V D"],
        layers: DecoderLayer | list[DecoderLayer],
        final_norm: Float[Array, " D"],
        head: Float[Array, "V D"] | None,
        forecast: list[Float[Array, "D KRH"]] | None = None,
        storage: Storage = "per_layer",
    ):
        self.config = nnx.static(config)
        self.embedding = nnx.Param(embedding)
        self.final_norm = nnx.Param(final_norm)
        self.head: Any = None if head is None else nnx.Param(head)
        if isinstance(layers, DecoderLayer):
            assert storage == "stacked", "one layer is a stack of all"
            self.layers: DecoderLayer | nnx.List[DecoderLayer] = layers
        elif storage == "stacked":
            self.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        else:
            self.layers = nnx.List(layers)
        self.forecast: Forecast | nnx.List[Forecast] | None = nnx.data(None)
        if forecast is not None:
            self.set_forecast(forecast)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Decoder({config.name!r}, {config.num_layers} layers, "
            f"{self.numbers}, storage={self.storage!r}, "
            f"forecast={'yes' if self.forecast is not None else 'no'})"
        )

    @property
    def numbers(self) -> str:
        """The type of the weights, and that of copies that decode reads instead."""
        dtype = str(self.embedding[...].dtype)
        copied = self.head is not None and isinstance(self.head[...], Int8Weight)
        return f"{dtype}, decoding in int8" if copied else dtype

    @property
    def storage(self) -> Storage:
        """How the layer weights are held."""
        return "per_layer" if isinstance(self.layers, nnx.List) else "stacked"

    def set_forecast(
        self,
        heads: list[Float[Array, "D KRH"]],
        reads: ForecastReads = "input",
    ) -> None:
        """Installs Forecast heads, one per consuming layer, in the model's storage.

        Their width says how many queries a kv head has: `config` tells it from then on,
        and what the heads read of a layer (`ModelConfig.forecast_reads`).
        """
        one = self.config.num_kv_heads * self.config.head_dim
        queries = heads[0].shape[-1] // one
        config = dataclasses.replace(
            self.config, forecast_queries=queries, forecast_reads=reads
        )
        if config != self.config:
            self.config = nnx.static(config)
        if self.storage == "stacked":
            self.forecast = Forecast(jnp.stack(list(heads)))
        else:
            self.forecast = nnx.List([Forecast(head) for head in heads])

    def with_forecast(
        self,
        heads: list[Float[Array, "D KRH"]],
        reads: ForecastReads = "input",
    ) -> "Decoder":
        """A decoder with these Forecast heads; all other arrays are shared."""
        other = jax.tree.map(lambda array: array, self)
        other.set_forecast(heads, reads)
        return other

    def forecast_head(self, layer: int | Int[Array, ""]) -> Float[Array, "D KRH"]:
        """The head whose forecast layer `layer` (mod L) consumes."""
        assert self.forecast is not None
        index = layer % self.config.num_layers
        if isinstance(self.forecast, nnx.List):
            assert isinstance(index, int)
            return self.forecast[index][...]
        return jax.lax.dynamic_index_in_dim(self.forecast[...], index, keepdims=False)

    def query_weights(self) -> list[Float[Array, "D NH"]]:
        """W_q of every layer."""
        width = self.config.num_heads * self.config.head_dim
        if isinstance(self.layers, nnx.List):
            return [as_array(layer.qkv[..., :width]) for layer in self.layers]
        return list(self.layers.qkv[..., :width])

    def first_attention_norm(self) -> Float[Array, " D"]:
        """Input norm of layer 0, which layer 0's own Forecast needs before the loop."""
        if isinstance(self.layers, nnx.List):
            return self.layers[0].attention_norm[...]
        return self.layers.attention_norm[0]

    def first_mlp_norm(self) -> Float[Array, " D"]:
        """The norm of what layer 0's MLP reads, for heads that read that."""
        if isinstance(self.layers, nnx.List):
            return self.layers[0].mlp_norm[...]
        return self.layers.mlp_norm[0]


def run_layers[Carry](
    model: Decoder,
    body: Callable[[Carry, DecoderLayer, int | Int[Array, ""]], Carry],
    carry: Carry,
    *,
    unscanned_layers: int = 0,
) -> Carry:
    """Runs `body(carry, layer, index)` over the layers: scanned or unrolled.

    Args:
      model: The decoder.
      body: One layer; the index is an `int` where layers are unrolled.
      carry: What travels through the layers.
      unscanned_layers: Leading layers that run before the scan, with an `int` index:
        their carry may have another structure. Unrolled layers need no such thing.
    """
    if isinstance(model.layers, nnx.List):
        for index, layer in enumerate(model.layers):
            carry = body(carry, layer, index)
        return carry

    def one(index: int | Array) -> DecoderLayer:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
            model.layers,
        )

    for index in range(unscanned_layers):
        carry = body(carry, one(index), index)

    # The scan takes each layer out of the stack by its index: cutting the leading
    # layers off would copy the stack.
    def step(carry: Carry, index: Array) -> tuple[Carry, None]:
        return body(carry, one(index), index), None

    indices = jnp.arange(unscanned_layers, model.config.num_layers)
    return jax.lax.scan(step, carry, indices)[0]


def embed(
    model: Decoder, tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Token embeddings times `embed_scale` (docs/algorithm.md §1.1, h0)."""
    table = model.embedding[...]
    if table.shape[0] == model.config.vocab_size:
        rows = jnp.take(table, tokens, axis=0).astype(dtype)
    else:  # A device of a mesh has a part of the vocabulary.
        own = tokens - first_token(table.shape[0], model.config.vocab_size)
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, jnp.where(here, own, 0), axis=0).astype(dtype)
        rows = jax.lax.psum(jnp.where(here[..., None], rows, 0), MODEL)
    return rows * jnp.asarray(model.config.embed_scale, dtype)


def own_logits(model: Decoder, h: Float[Array, "rows D"]) -> Float[Array, "rows W"]:
    """`logits` of the tokens that this device has: of all of them on one device."""
    config = model.config
    x = rms_norm(h, model.final_norm[...], config.rms_norm_eps)
    x = x / jnp.asarray(config.logits_divisor, x.dtype)
    head = model.embedding[...] if model.head is None else model.head[...]
    if isinstance(head, Int8Weight):
        return head.product(x).astype(jnp.float32)
    # The head is read as it is stored, [V, D], from the left: the transposed product
    # is three times slower for one row on a CPU.
    scores = jax.lax.dot_general(
        head.astype(x.dtype),
        x,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return scores.T


def logits(model: Decoder, h: Float[Array, "rows D"]) -> Float[Array, "rows V"]:
    """Final norm and head in float32 (docs/algorithm.md §1.1, logits)."""
    scores = own_logits(model, h)
    return of_all_devices(scores, scores.shape[1], model.config.vocab_size)
