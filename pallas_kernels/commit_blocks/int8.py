"""Blocks in 8 bits: how they are stored, and their values.

A block [block, 2, H] of keys and values is stored as integers of that shape and as
float32 scales: one for each of K's H channels, then one for each of V's tokens, then
any padding. A number is its integer times its scale.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallas_kernels._common.numerics import in_32_bit


def scale_of_each(
    k_scale: Float[Array, "*lead H"], v_scale: Float[Array, "*lead block"]
) -> Float[Array, "*lead block two H"]:
    """The scale of every number of a block.

    Args:
      k_scale: by channel of K.
      v_scale: by token of V.
    """
    both = jnp.broadcast_arrays(k_scale[..., None, :], v_scale[..., :, None])
    return jnp.stack(both, axis=-2)


@in_32_bit
def decoded(
    whole: Int8[Array, "*lead block two H"],
    scales: Float[Array, "*lead S"],
    dtype: DTypeLike,
) -> Float[Array, "*lead block two H"]:
    """Values of stored blocks: a product in float32, rounded once.

    Args:
      whole: integers.
      scales: of K's channels, of V's tokens, padding.
      dtype: of the result.
    """
    *_, block, _, dim = whole.shape
    scale = scale_of_each(scales[..., :dim], scales[..., dim : dim + block])
    return (whole.astype(jnp.float32) * scale).astype(dtype)
