"""A layer's query projection by itself, for those who ask with it from elsewhere."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from sparda_jax.models.decoder import Decoder
from sparda_jax.models.int8_weight import Int8Weight
from sparda_jax.models.layers import matmul, rms_norm
from sparda_jax.models.rope import RopeCosSin, apply_rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryProjection:
    """What makes a layer's queries of a normalised input.

    Attributes:
      weight: [D, N·H], or as integers.
      bias: [N·H], or None.
      norm: RMSNorm of every query head [H], or None.
      eps: Its epsilon.
    """

    weight: Float[Array, "D NH"] | Int8Weight
    bias: Float[Array, " NH"] | None
    norm: Float[Array, " H"] | None
    eps: float = dataclasses.field(metadata={"static": True})


def query_projection(model: Decoder, layer: int | Int[Array, ""]) -> QueryProjection:
    """The query projection of layer `layer` (mod L)."""
    config = model.config
    index, width = layer % config.num_layers, config.num_heads * config.head_dim
    if isinstance(model.layers, nnx.List):
        assert isinstance(index, int)
        one = model.layers[index]
        weight, bias, norm = one.qkv[..., :width], one.qkv_bias, one.q_norm
        bias = None if bias is None else bias[:width]
        norm = None if norm is None else norm[...]
    else:
        stack = model.layers

        def cut(array: Array, *sizes: int) -> Array:
            start = (index, *(0 for _ in sizes))
            return jax.lax.dynamic_slice(array, start, (1, *sizes))[0]

        weight = cut(stack.qkv[...], config.hidden_size, width)
        bias = None if stack.qkv_bias is None else cut(stack.qkv_bias[...], width)
        norm = None if stack.q_norm is None else cut(stack.q_norm[...], config.head_dim)
    return QueryProjection(weight, bias, norm, config.rms_norm_eps)


def project_query(
    x: Float[Array, "B T D"], projection: QueryProjection, rope_cos_sin: RopeCosSin
) -> Float[Array, "B T N H"]:
    """Queries after RoPE, as the layer itself makes them of its normalised input."""
    q = matmul(x, projection.weight)
    if projection.bias is not None:
        q = q + projection.bias.astype(q.dtype)
    q = q.reshape(*x.shape[:2], -1, 2 * rope_cos_sin.cos.shape[-1])
    if projection.norm is not None:
        q = rms_norm(q, projection.norm, projection.eps)
    return apply_rope(q, rope_cos_sin)
