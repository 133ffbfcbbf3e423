"""Compressed keys in XLA: every key is read once.

Windows overlap, so that a gather would read a key ``kernel_size / kernel_stride``
times. Sums over strides are formed once and neighbouring ones added.
"""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import in_32_bit
from pallas_kernels.compress_keys.reference import window_count


@in_32_bit
def compress_keys_xla(
    keys: Float[Array, "B K S H"], *, kernel_size: int, kernel_stride: int
) -> Float[Array, "B K W H"]:
    """Computes the means in the dtype of ``keys``, accumulated in float32."""
    batch, kv_heads, length, head_dim = keys.shape
    windows = window_count(length, kernel_size, kernel_stride)
    overlap = kernel_size // kernel_stride
    parts = windows + overlap - 1 if windows else 0
    used = keys[:, :, : parts * kernel_stride].astype(jnp.float32)
    sums = used.reshape(batch, kv_heads, parts, kernel_stride, head_dim).sum(3)
    shifted = (sums[:, :, i : i + windows] for i in range(overlap))
    total = cast(Array, sum(shifted))
    return (total / kernel_size).astype(keys.dtype)
