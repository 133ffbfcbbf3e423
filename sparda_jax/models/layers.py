"""Small pieces of a decoder layer: normalisation and the gated MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.models.int8_weight import Int8Weight


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, "*heads D"], eps: float
) -> Float[Array, "*rows D"]:
    """RMSNorm: variance and division in float32, cast, then times the weight.

    `weight` is one vector, or one per head.

    Source: docs/algorithm.md §6 (numerics).
    """
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * weight


def matmul(
    x: Float[Array, "*rows D"], weight: Float[Array, "D E"] | Int8Weight
) -> Float[Array, "*rows E"]:
    """x · weight in x's dtype; rows are flattened so that one GEMM runs."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Int8Weight):
        product = weight.product(rows)
    else:
        product = rows @ weight.astype(x.dtype)
    return product.reshape(*x.shape[:-1], -1)


def swiglu(
    x: Float[Array, "*rows D"],
    gate_up: Float[Array, "D F2"] | Int8Weight,
    down: Float[Array, "F D"] | Int8Weight,
) -> Float[Array, "*rows D"]:
    """down(silu(gate(x)) · up(x)); `gate_up` holds gate and up side by side."""
    gate, up = jnp.split(matmul(x, gate_up), 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, down)
