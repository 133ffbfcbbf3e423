"""The device that a call runs on or lowers for.

Inside ``use_abstract_mesh`` it is the mesh's device, which need not be at hand;
otherwise JAX's default device.
"""

from __future__ import annotations

import re
from typing import Any

import jax

# Compute capabilities by what a device's kind contains, for devices that are only
# lowered for. The first that fits counts.
CAPABILITIES: tuple[tuple[str, float], ...] = (
    (r"\bRTX PRO \d+ Blackwell|\bRTX 50\d\d", 12.0),
    (r"\bG?B300", 10.3),
    (r"\bG?B200|\bB100", 10.0),
    (r"\bG?H200|\bH100|\bH800|\bH20\b", 9.0),
    (r"\bL40S?|\bL4\b|\bL20\b|\bRTX 40\d\d|\bRTX \d+ Ada", 8.9),
    (r"\bA10G?\b|\bA16\b|\bA40\b|\bA2\b|\bRTX A\d+|\bRTX 30\d\d", 8.6),
    (r"\bA100|\bA800|\bA30\b", 8.0),
    (r"\bT4\b|\bRTX 20\d\d|\bQuadro RTX|\bTITAN RTX", 7.5),
    (r"\bV100|\bTITAN V", 7.0),
)


def device_slug(kind: str) -> str:
    """Folder name of a device kind: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def capability_of(kind: str) -> float | None:
    """Compute capability of a device kind by its name; None for an unknown one."""
    for pattern, capability in CAPABILITIES:
        if re.search(pattern, kind):
            return capability
    return None


def _abstract_device() -> jax.sharding.AbstractDevice | None:
    """The device of the mesh in use, if it names one."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _default_device() -> Any:
    """A `jax.Device`, or what a test puts in its place."""
    default = jax.config.jax_default_device
    if default is not None and not isinstance(default, str):
        return default
    return jax.devices(default)[0]


def current_device_kind() -> str:
    """The kind of the device that the call will run or lower for."""
    abstract = _abstract_device()
    return (_default_device() if abstract is None else abstract).device_kind


def current_platform() -> str:
    """Platform the call will run or lower for: "cpu", "cuda", ..."""
    abstract = _abstract_device()
    platform = (_default_device() if abstract is None else abstract).platform
    # A mesh of real devices, as inside `shard_map`, names them as their client does.
    return "cuda" if platform == "gpu" else platform


def current_compute_capability() -> float | None:
    """Compute capability of the CUDA device that the call will run or lower for.

    None off CUDA, and for a device that is only lowered for and has an unknown kind.
    """
    if current_platform() != "cuda":
        return None
    device = device_at_hand()
    if device is None:
        return capability_of(current_device_kind())
    capability = getattr(device, "compute_capability", None)
    return None if capability is None else float(capability)


def device_at_hand() -> Any:
    """The CUDA `jax.Device` that the call will run on.

    None off CUDA, and when there is none such and a call can only be lowered. Inside
    `shard_map` it is one of the mesh's kind.
    """
    if current_platform() != "cuda":
        return None
    abstract = _abstract_device()
    if abstract is None:
        return _default_device()
    of_kind = (
        device
        for device in jax.local_devices()
        if device.platform == "gpu" and device.device_kind == abstract.device_kind
    )
    return next(of_kind, None)


def require_cuda(implementation: str, least: float, below: float | None = None) -> None:
    """Refuses where a Pallas back end has no device to run on.

    Args:
      implementation: its name, for the message.
      least: the smallest compute capability that it supports.
      below: the capability from which on it does not; None for no such limit.

    Raises:
      NotImplementedError: off CUDA, or on a GPU that is older than ``least`` or not
        older than ``below``.
    """
    platform = current_platform()
    if platform != "cuda":
        raise NotImplementedError(
            f"{implementation} needs a CUDA device; the platform is {platform!r}"
        )
    capability = current_compute_capability()
    if capability is None:
        return
    if capability < least or (below is not None and capability >= below):
        wanted = f"{least} or newer" if below is None else f"{least} to below {below}"
        raise NotImplementedError(
            f"{implementation} needs compute capability {wanted}; {capability} is that "
            f"of {current_device_kind()}"
        )
