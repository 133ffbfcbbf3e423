"""Settings of the JAX runtime that offloaded KV needs on a GPU.

XLA decides when it starts whether a fetch can run beside compute. Compute has to be in
CUDA graphs (or its own launches queue behind the fetch's reads on the link), and the
fetch has to stay out of them (or it is captured into the same serial graph): graphs are
made of fusions and matrix products only, and the fetch kernel is a custom call. With
the default flags everything ends up on one stream and nothing overlaps.
"""

import os
import warnings

import jax

from sparda_jax.machine import physical_memory

COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT"
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_FLAG = "--xla_gpu_enable_command_buffer"


def configure_offload() -> None:
    """Sets the flags for offloaded KV on a GPU. Call it before JAX computes anything.

    Puts the command buffer flag into `XLA_FLAGS`, unless they name one already, and
    sets the limit of pinned memory (64 GB by default) to nine tenths of the machine's
    memory, or of what its container may use, unless it is set. The command line does
    this for itself; on a CPU it changes nothing.

    Warns:
      RuntimeWarning: If JAX has started on a GPU already, so that it is too late.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags:
        if _started() and jax.default_backend() == "gpu":
            warnings.warn(
                "configure_offload() is too late: JAX has started. Call it before "
                f"anything is computed, or set XLA_FLAGS={COMMAND_BUFFERS}",
                RuntimeWarning,
                stacklevel=2,
            )
        os.environ["XLA_FLAGS"] = f"{flags} {COMMAND_BUFFERS}".strip()
    memory = physical_memory()
    if memory is not None:
        gib = max(1, int(memory.size * 0.9 / 2**30))
        os.environ.setdefault(HOST_LIMIT, str(gib))


def _started() -> bool:
    """Whether a JAX backend exists, without starting one."""
    from jax._src import xla_bridge  # no public function answers this

    return xla_bridge.backends_are_initialized()


def warn_if_serial() -> None:
    """Warns where a fetch beside compute would not overlap for want of the flags."""
    if jax.default_backend() != "gpu":
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if COMMAND_BUFFERS not in flags:
        warnings.warn(
            "offloaded KV runs without "
            f"XLA_FLAGS={COMMAND_BUFFERS}: fetches will not overlap with compute. Call "
            "sparda_jax.configure_offload() before JAX starts",
            RuntimeWarning,
            stacklevel=3,
        )
