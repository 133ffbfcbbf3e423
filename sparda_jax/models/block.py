"""One decoder layer around its attention: the same for inference and training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.config import ModelConfig
from sparda_jax.models.decoder import DecoderLayer
from sparda_jax.models.experts import route, routed_mlp
from sparda_jax.models.layers import matmul, rms_norm, swiglu
from sparda_jax.models.rope import RopeCosSin, apply_rope


class AttentionInputs(NamedTuple):
    """What a layer's attention works on.

    Attributes:
      x: The layer's normalised input, which Forecast heads read.
      q, k: Queries and keys after RoPE.
      v: Values.
      key_bias: NOSA's c of each token, float32, or None.
    """

    x: Float[Array, "B T D"]
    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None


def before_attention(
    layer: DecoderLayer,
    config: ModelConfig,
    h: Float[Array, "B T D"],
    rope_cos_sin: RopeCosSin,
) -> AttentionInputs:
    """Input norm, projections, norms of q and k, RoPE (docs/algorithm.md §1)."""
    x = rms_norm(h, layer.attention_norm[...], config.rms_norm_eps)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    fused = matmul(x, layer.qkv[...])
    if layer.qkv_bias is not None:
        fused = fused + layer.qkv_bias[...].astype(fused.dtype)
    fused = fused.reshape(*x.shape[:2], heads + 2 * kv_heads, dim)
    qk, v = jnp.split(fused, (heads + kv_heads,), axis=2)
    if layer.q_norm is not None and layer.k_norm is not None:
        weight = jnp.concatenate(
            (
                jnp.broadcast_to(layer.q_norm[...], (heads, dim)),
                jnp.broadcast_to(layer.k_norm[...], (kv_heads, dim)),
            )
        )
        qk = rms_norm(qk, weight, config.rms_norm_eps)
    q, k = jnp.split(apply_rope(qk, rope_cos_sin), (heads,), axis=2)
    return AttentionInputs(x, q, k, v, _key_bias(layer, v))


def _key_bias(
    layer: DecoderLayer, v: Float[Array, "B T K H"]
) -> Float[Array, "B T K"] | None:
    """NOSA's key bias c = A ⊙ softplus(delta(v)), float32 (docs/algorithm.md §1.2)."""
    if layer.key_bias_scale is None or layer.key_bias_delta is None:
        return None
    flat = v.reshape(*v.shape[:2], -1)
    gate = jax.nn.softplus(matmul(flat, layer.key_bias_delta[...]))
    return (layer.key_bias_scale[...] * gate).astype(jnp.float32)


def add_attention(
    layer: DecoderLayer,
    config: ModelConfig,
    h: Float[Array, "*rows D"],
    attended: Float[Array, "*rows NH"],
    *,
    axis: str | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """The output projection, added to the layer's input (docs/algorithm.md §1).

    Args:
      layer: Its weights.
      config: The model.
      h: The layer's input.
      attended: What its attention gave.
      axis: Of a mesh whose devices divide heads and MLP: the sum is completed over it.
        None for a device that has all.

    Returns:
      The hidden states, and what the MLP reads: them, normalised.
    """
    out = _whole(matmul(attended, layer.out[...]), axis)
    if layer.out_bias is not None:
        out = out + layer.out_bias[...].astype(out.dtype)
    h = h + jnp.asarray(config.residual_scale, h.dtype) * out
    return h, rms_norm(h, layer.mlp_norm[...], config.rms_norm_eps)


def add_mlp(
    layer: DecoderLayer,
    config: ModelConfig,
    h: Float[Array, "*rows D"],
    x: Float[Array, "*rows D"],
    *,
    axis: str | None = None,
) -> Float[Array, "*rows D"]:
    """The MLP, added to what came before it; h and x are of `add_attention`."""
    scale = jnp.asarray(config.residual_scale, h.dtype)
    return h + scale * _whole(_mlp(layer, config, x), axis)


def _whole(part: Float[Array, "*rows D"], axis: str | None) -> Float[Array, "*rows D"]:
    return part if axis is None else jax.lax.psum(part, axis)


def _mlp(
    layer: DecoderLayer, config: ModelConfig, x: Float[Array, "*rows D"]
) -> Float[Array, "*rows D"]:
    """The gated MLP: one for all tokens, or each token's experts and the shared one."""
    if layer.router is None:
        assert layer.gate_up is not None and layer.down is not None
        return swiglu(x, layer.gate_up[...], layer.down[...])
    assert layer.expert_gate_up is not None and layer.expert_down is not None
    rows = x.reshape(-1, x.shape[-1])
    routes = route(
        rows,
        layer.router[...],
        config.experts_per_token,
        normalize=config.normalize_router,
    )
    out = routed_mlp(rows, routes, layer.expert_gate_up[...], layer.expert_down[...])
    if layer.shared_gate is not None:
        assert layer.shared_gate_up is not None and layer.shared_down is not None
        shared = swiglu(rows, layer.shared_gate_up[...], layer.shared_down[...])
        out = out + jax.nn.sigmoid(matmul(rows, layer.shared_gate[...])) * shared
    return out.reshape(x.shape)
