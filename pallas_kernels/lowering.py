"""Lowering for a GPU on a machine that has none: API and type errors show early."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

HOPPER = "NVIDIA H200"


def cuda_lowering_text(
    f: Callable[..., Any], *args: Any, kind: str = HOPPER, x64: bool = False
) -> str:
    """The StableHLO of ``f`` lowered for CUDA, with no CUDA device at hand.

    Catches what a kernel's front end rejects. Not the limits of an architecture,
    shared memory or numerics: those need the device.

    Args:
      f: function of ``args``.
      *args: arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are used.
      kind: device kind to lower for.
      x64: with ``jax_enable_x64``.

    Returns:
      The module as text.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(kind, None, "cuda"),
    )
    with jax.sharding.use_abstract_mesh(mesh), jax.enable_x64(x64):
        traced = jax.jit(f).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def silence_triton_deprecation() -> None:
    """Silences JAX's notice that the Triton back end will be removed.

    The only place that knows about it; every Triton kernel calls this before it is
    traced. The notice is given while lowering, after the kernel's function has
    returned, so that the filter has to outlive the call. It names that one message.
    Who lowers what may have been traced earlier calls this as well: filters may have
    been put back since, as pytest does behind each test.
    """
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
