"""The device that a call runs on or lowers for.

Inside ``use_abstract_mesh`` it is the mesh's device, which need not be at hand;
otherwise JAX's default device.
"""

from __future__ import annotations

import re

import jax


def device_slug(kind: str) -> str:
    """Folder name of a device kind: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def current_device_kind() -> str:
    """The kind of the device that the call will run or lower for."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        return abstract.device_kind
    default = jax.config.jax_default_device
    if default is not None and not isinstance(default, str):
        return default.device_kind
    return jax.devices(default)[0].device_kind


def current_platform() -> str:
    """Platform the call will run or lower for: "cpu", "cuda", ..."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    default = jax.config.jax_default_device
    if abstract is not None:
        platform = abstract.platform
    elif default is not None and not isinstance(default, str):
        platform = default.platform
    else:
        platform = jax.devices(default)[0].platform
    # A mesh of real devices, as inside `shard_map`, names them as their client does.
    return "cuda" if platform == "gpu" else platform


def current_compute_capability() -> float | None:
    """Compute capability of the CUDA device at hand; None when only lowering."""
    mesh = jax.sharding.get_abstract_mesh()
    if getattr(mesh, "abstract_device", None) is not None:
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return None if capability is None else float(capability)


def require_cuda(implementation: str, least: float) -> None:
    """Refuses where a Pallas back end has no device to run on.

    Args:
      implementation: its name, for the message.
      least: the smallest compute capability that it supports.

    Raises:
      NotImplementedError: off CUDA, or on a GPU older than ``least``.
    """
    platform = current_platform()
    if platform != "cuda":
        raise NotImplementedError(
            f"{implementation} needs a CUDA device; the platform is {platform!r}"
        )
    capability = current_compute_capability()
    if capability is not None and capability < least:
        raise NotImplementedError(
            f"{implementation} needs compute capability {least} or newer; the device "
            f"has {capability}"
        )
