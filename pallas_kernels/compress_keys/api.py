"""Public entry of key compression: checks, then dispatch."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels._common import validation
from pallas_kernels.dispatch import Implementation, dispatch

OP = "compress_keys"


def compress_keys(
    keys: Float[Array, "B K S H"],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    implementation: Implementation | None = None,
) -> Float[Array, "B K W H"]:
    """Means of the complete windows of keys: row m covers keys m * stride and on.

    The first-level compressed keys of InfLLM-V2 (reference implementation
    NVlabs/SparDA, ``modeling_minicpm.py``), accumulated in float32.

    Args:
      keys: keys with their positions rotated in.
      kernel_size: keys of a window, a multiple of ``kernel_stride``.
      kernel_stride: keys from one window's start to the next.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      The means in the dtype of ``keys``; W = (S - kernel_size) // kernel_stride + 1,
      0 when S is shorter than a window.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    validation.require_shape("keys", keys, (None,) * 4, "B K S H")
    validation.require_float("keys", keys)
    validation.require_positive("kernel_size", kernel_size)
    validation.require_positive("kernel_stride", kernel_stride)
    if kernel_size % kernel_stride:
        raise ValueError(
            f"kernel_size is {kernel_size}; it must be a multiple of kernel_stride, "
            f"{kernel_stride}"
        )

    def run(name: str) -> Float[Array, "B K W H"]:
        sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
        if name == "mosaic_gpu":
            from pallas_kernels.compress_keys import pallas_mosaic_gpu as mosaic

            return mosaic.compress_keys_mosaic_gpu(keys, **sizes)
        if name == "triton":
            from pallas_kernels.compress_keys.pallas_triton import compress_keys_triton

            return compress_keys_triton(keys, **sizes)
        from pallas_kernels.compress_keys.xla import compress_keys_xla

        return compress_keys_xla(keys, **sizes)

    return dispatch(OP, implementation, run)
