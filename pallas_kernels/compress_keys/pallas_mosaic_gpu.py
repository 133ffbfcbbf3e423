"""Compressed keys on Mosaic GPU (Hopper: TMA).

Algorithm: a thread block sums the keys of 64 consecutive windows, one key of every
window a step. Seen as rows of ``kernel_stride`` keys, those are one column of 64 rows,
which one TMA copy brings into a ring of shared-memory stages; a second warpgroup adds
them up in registers. Windows overlap: the second read of a key is served by L2. What
lies beyond the last key arrives as zeros; the result has whole tiles, of which the
windows that exist are cut out. Grid: (window tiles, B * K).

Shared memory: ``stages`` + 1 tiles of 64 x H, 80 KiB for H = 128 in bfloat16.

Not the default anywhere: XLA's form is faster. One H200, 16 rows of 131,072 keys, H =
128, bfloat16, durations in a profile (jax 0.11.2, spread at most 0.3 %): XLA 0.324 ms
(3,548 GB/s), this kernel 0.364 ms with 8 stages, 12 % behind, Triton 0.554 ms. The
likely cause, not shown: a copy takes one key of every window, so that neighbouring
bytes are asked for by different copies, which L2 has to join.

Limits: H a multiple of 16 up to 256. When S is no multiple of the stride, the keys
are copied once without their tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.mosaic import SHARED_BYTES, fill_and_refill
from pallas_kernels._common.numerics import cdiv, in_32_bit
from pallas_kernels.compress_keys.reference import window_count
from pallas_kernels.dispatch import tuned_config

WINDOWS = 64  # of a thread block
COMPUTE, MEMORY = 0, 1  # warpgroups


@dataclass(frozen=True)
class Config:
    """Settings of the kernel.

    Attributes:
      stages: stages of the shared-memory ring, at least 2.
    """

    stages: int = 4

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; it must be at least 2")


def _body(refs, scoped, *, kernel_size: int, kernel_stride: int, stages: int):
    keys_ref, out_ref = refs
    k_smem, out_smem, ready, done = scoped
    tile, pair, wg = (lax.axis_index(name) for name in ("tile", "pair", "wg"))
    head_dim = out_ref.shape[-1]
    first = tile * WINDOWS

    @pl.when(wg == MEMORY)
    def _memory():
        def fetch(i, stage):
            row = first + lax.div(i, jnp.int32(kernel_stride))
            column = lax.rem(i, jnp.int32(kernel_stride)) * head_dim
            plgpu.copy_gmem_to_smem(
                keys_ref.at[pair, pl.ds(row, WINDOWS), pl.ds(column, head_dim)],
                k_smem.at[stage],
                ready.at[stage],
            )

        fill_and_refill(fetch, jnp.int32(kernel_size), stages, (done,))

    @pl.when(wg == COMPUTE)
    def _compute():
        layout = plgpu.Layout.WG_STRIDED((WINDOWS, head_dim), 8)

        def add(i, total):
            stage = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])
            part = plgpu.load(k_smem.at[stage], layout=layout)
            plgpu.barrier_arrive(done.at[stage])
            return total + part.astype(jnp.float32)

        total = jnp.zeros((WINDOWS, head_dim), jnp.float32)
        total = plgpu.layout_cast(total, layout)
        total = lax.fori_loop(0, kernel_size, add, total)
        out_smem[...] = (total * (1.0 / kernel_size)).astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[pair, pl.ds(first, WINDOWS)])
        plgpu.wait_smem_to_gmem(0)


@in_32_bit
def compress_keys_mosaic_gpu(
    keys: Float[Array, "B K S H"],
    *,
    kernel_size: int,
    kernel_stride: int,
    config: Config | None = None,
) -> Float[Array, "B K W H"]:
    """Computes the means in the dtype of ``keys``, accumulated in float32.

    Args:
      keys: as in the reference.
      kernel_size: keys of a window.
      kernel_stride: keys from one window's start to the next.
      config: settings; recorded or default ones if None.

    Raises:
      NotImplementedError: for sizes that the kernel cannot tile, or without a Hopper
        device.
    """
    batch, kv_heads, length, head_dim = keys.shape
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise NotImplementedError(
            f"mosaic_gpu needs a head dim that is a multiple of 16 up to 256, not "
            f"{head_dim}"
        )
    require_cuda("mosaic_gpu", 9.0)
    windows = window_count(length, kernel_size, kernel_stride)
    if windows == 0:
        return jnp.zeros((batch, kv_heads, 0, head_dim), keys.dtype)
    if config is None:
        sizes = {"H": head_dim, "kernel_size": kernel_size}
        found = tuned_config("compress_keys", "mosaic_gpu", sizes)
        config = Config(**found) if found else Config()
    tile_bytes = WINDOWS * head_dim * keys.dtype.itemsize
    most = (SHARED_BYTES - 4096) // tile_bytes - 1
    stages = min(config.stages, most, max(2, kernel_size))
    rows = length // kernel_stride
    strides = keys[:, :, : rows * kernel_stride].reshape(
        batch * kv_heads, rows, kernel_stride * head_dim
    )
    tiles = cdiv(windows, WINDOWS)
    if kernel_stride == 1:
        # A copy of whole rows is one contiguous piece, which nothing cuts at the end.
        after = tiles * WINDOWS + kernel_size - rows
        strides = jnp.pad(strides, ((0, 0), (0, max(0, after)), (0, 0)))

    def compress_keys_mosaic_gpu(*refs):
        tile = (WINDOWS, head_dim)
        pl.run_scoped(
            lambda *scoped: _body(
                refs,
                scoped,
                kernel_size=kernel_size,
                kernel_stride=kernel_stride,
                stages=stages,
            ),
            plgpu.SMEM((stages, *tile), keys.dtype),
            plgpu.SMEM(tile, keys.dtype),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            collective_axes="wg",
        )

    out = plgpu.kernel(
        compress_keys_mosaic_gpu,
        out_type=jax.ShapeDtypeStruct(
            (batch * kv_heads, tiles * WINDOWS, head_dim), keys.dtype
        ),
        grid=(tiles, batch * kv_heads),
        grid_names=("tile", "pair"),
        num_threads=2,
        thread_name="wg",
    )(strides)
    return out[:, :windows].reshape(batch, kv_heads, windows, head_dim)


__all__ = ["Config", "compress_keys_mosaic_gpu"]
