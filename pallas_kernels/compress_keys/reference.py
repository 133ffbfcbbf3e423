"""The definition of compressed keys."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import in_32_bit


def window_count(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Number of complete windows among ``length`` keys."""
    return max(0, (length - kernel_size) // kernel_stride + 1)


@in_32_bit
def compress_keys_reference(
    keys: Float[Array, "B K S H"], *, kernel_size: int, kernel_stride: int
) -> Float[Array, "B K W H"]:
    """Mean of every complete window, float32: one gather, one mean."""
    windows = window_count(keys.shape[2], kernel_size, kernel_stride)
    first = jnp.arange(windows) * kernel_stride
    index = first[:, None] + jnp.arange(kernel_size)
    return keys.astype(jnp.float32)[:, :, index].mean(3)
