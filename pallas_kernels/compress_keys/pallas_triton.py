"""Compressed keys on Triton (compute capability 8.0 and newer).

Algorithm: a program sums the keys of some windows, one key of every window at a time.
Windows overlap; the second read of a key is served by the cache. Grid: (window tiles,
B * K).

Limits: H a power of two. The back end is deprecated in JAX; this file can be deleted
with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import cdiv, in_32_bit
from pallas_kernels._common.triton import WarpsConfig, launch
from pallas_kernels.compress_keys.reference import window_count

WINDOWS = 8  # windows of a program


@in_32_bit
def compress_keys_triton(
    keys: Float[Array, "B K S H"],
    *,
    kernel_size: int,
    kernel_stride: int,
    interpret: bool = False,
) -> Float[Array, "B K W H"]:
    """Computes the means in the dtype of ``keys``, accumulated in float32.

    Raises:
      NotImplementedError: for sizes Triton cannot tile, or without a CUDA device.
    """
    batch, kv_heads, length, head_dim = keys.shape
    if head_dim & (head_dim - 1):
        raise NotImplementedError(
            f"triton needs a head dim that is a power of two, not {head_dim}"
        )
    if not interpret:
        require_cuda("triton", 8.0)
    windows = window_count(length, kernel_size, kernel_stride)
    results = batch * kv_heads * windows * head_dim
    if keys.size >= 2**31:
        raise NotImplementedError(
            f"triton compresses fewer than 2**31 elements, not {keys.shape}"
        )

    def kernel(keys_ref, out_ref):
        first, pair = pl.program_id(0) * WINDOWS, pl.program_id(1)
        window = first + jnp.arange(WINDOWS)
        column = jnp.arange(head_dim)[None]
        total = jnp.zeros((WINDOWS, head_dim), jnp.float32)
        for i in range(kernel_size):
            row = window * kernel_stride + i
            inside = jnp.broadcast_to((row < length)[:, None], total.shape)
            row = pair * length + jnp.minimum(row, length - 1)
            part = plt.load(
                keys_ref.at[row[:, None] * head_dim + column], mask=inside, other=0.0
            )
            total = total + part.astype(jnp.float32)
        # What is not stored points behind the result: no two lanes name one place.
        inside = jnp.broadcast_to((window < windows)[:, None], total.shape)
        place = (pair * windows + window)[:, None] * head_dim + column
        plt.store(
            out_ref.at[jnp.where(inside, place, results)],
            (total / kernel_size).astype(keys.dtype),
            mask=inside,
        )

    if windows == 0:
        return jnp.zeros((batch, kv_heads, 0, head_dim), keys.dtype)
    out = launch(
        kernel,
        keys.reshape(-1),
        grid=(cdiv(windows, WINDOWS), batch * kv_heads),
        out_shape=jax.ShapeDtypeStruct((results + 1,), keys.dtype),
        config=WarpsConfig(),
        interpret=interpret,
        name="compress_keys_triton",
    )
    return out[:results].reshape(batch, kv_heads, windows, head_dim)
