"""Settings of the JAX runtime: a cache of programs, and what offloaded KV needs.

XLA decides when it starts whether a fetch can run beside compute. Compute has to be in
CUDA graphs (or its own launches queue behind the fetch's reads on the link), and the
fetch has to stay out of them (or it is captured into the same serial graph): graphs are
made of fusions and matrix products only, and the fetch kernel is a custom call. With
the default flags everything ends up on one stream and nothing overlaps.
"""

import os
import pathlib
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

from sparda_jax.checkpoint.fetch import cache_directory
from sparda_jax.checks import ConfigError, optional, shown
from sparda_jax.checks import path as checked_path
from sparda_jax.machine import physical_memory

COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT"
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_FLAG = "--xla_gpu_enable_command_buffer"


def configure_offload() -> None:
    """Sets the flags for offloaded KV on a GPU. Call it before JAX computes anything.

    Two variables of the environment:

    * `XLA_FLAGS` gets `--xla_gpu_enable_command_buffer=…`, unless it names that flag.
      Without it no fetch runs beside compute.
    * `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`, unless it is set, becomes nine tenths of the
      machine's memory, or of what its container may use. It is the most that may be
      pinned, 64 GB by default.

    The command line does this for itself; on a CPU it changes nothing.

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


def configure_cache(directory: str | os.PathLike | None = None) -> pathlib.Path:
    """Keeps compiled programs between processes. The command line does so by itself.

    A process that compiles what an earlier one compiled, with the same versions, flags
    and device, then reads it from a file. May be called at any time; programs that are
    compiled already are not written. The directory is made for this user alone: whoever
    can write to it can have this process run code.

    Args:
      directory: Where; None is where JAX keeps them already
        (`JAX_COMPILATION_CACHE_DIR`), else `xla` in `$SPARDA_CACHE` or the platform's
        cache directory.

    Returns:
      The directory.

    Raises:
      ConfigError: If it cannot be made or written to.
    """
    chosen = optional(checked_path)("directory", directory)
    chosen = chosen or jax.config.jax_compilation_cache_dir or cache_directory() / "xla"
    folder = pathlib.Path(chosen).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"directory={shown(str(folder))}: {reason}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"directory={shown(str(folder))} is not writable")
    if jax.config.jax_compilation_cache_dir != str(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        # JAX looks at the setting when it first compiles, and never again.
        compilation_cache.reset_cache()
    return folder


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
