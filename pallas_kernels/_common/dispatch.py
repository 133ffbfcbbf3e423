"""Which implementation serves a call, and the recorded settings it runs with.

``tuned/<device>/<op>.json`` is the record of one device kind::

    {"device": "NVIDIA H200", "jax": "0.11.2", "default": ["mosaic_gpu", "xla"],
     "orders": [{"when": {"softmax": true}, "default": ["triton", "xla"]}],
     "configs": {"triton": [{"when": {"H": 128}, "config": {"block_kv": 64}}]}}

``default`` lists the implementations tried in that order when the caller names none;
an implementation is put there only after its numerics and its timing were recorded
on that device kind. ``orders``, where there are any, replace it for calls of their
sizes. ``configs`` holds tile sizes by implementation: the first entry
whose ``when`` holds for the call's sizes is used.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

Implementation = Literal["mosaic_gpu", "triton", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
TUNED = Path(__file__).resolve().parent.parent / "tuned"


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


@functools.cache
def tuned_record(op: str, kind: str) -> Mapping[str, Any]:
    """The JSON record of ``op`` on device kind ``kind``; empty when there is none."""
    path = TUNED / device_slug(kind) / f"{op}.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _fits(when: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    """Whether a record's entry is for a call of these sizes."""
    return all(sizes.get(name) == size for name, size in when.items())


def tuned_config(op: str, implementation: str, sizes: Mapping[str, Any]) -> dict:
    """Recorded settings for a call of these sizes; empty when there is no entry."""
    record = tuned_record(op, current_device_kind())
    for entry in record.get("configs", {}).get(implementation, []):
        if _fits(entry["when"], sizes):
            return dict(entry["config"])
    return {}


def candidates(
    op: str, implementation: str | None, sizes: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Implementations to try, in order.

    Args:
      op: name of the operation.
      implementation: the caller's choice; it is then the only candidate.
      sizes: what the call's record may tell apart.

    Raises:
      ValueError: when ``implementation`` is not a known name.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation is {implementation!r}; allowed: None or one of "
                f"{IMPLEMENTATIONS}"
            )
        return (implementation,)
    record = tuned_record(op, current_device_kind())
    order = tuple(record.get("default", ()))
    for entry in record.get("orders", ()):
        if _fits(entry["when"], sizes or {}):
            order = tuple(entry["default"])
            break
    return order if "xla" in order else (*order, "xla")


def dispatch[T](
    op: str,
    implementation: str | None,
    run: Callable[[str], T],
    sizes: Mapping[str, Any] | None = None,
) -> T:
    """Calls ``run`` with the first candidate that does not refuse.

    Args:
      op: name of the operation.
      implementation: the caller's choice, or None.
      run: takes an implementation's name; raises NotImplementedError to refuse.
      sizes: what the call's record may tell apart.

    Raises:
      NotImplementedError: when the caller's own choice refuses.
      ValueError: when ``implementation`` is not a known name.
    """
    *first, last = candidates(op, implementation, sizes)
    for name in first:
        try:
            return run(name)
        except NotImplementedError:
            continue
    return run(last)


def in_32_bit[**A, R](f: Callable[A, R]) -> Callable[A, R]:
    """Runs ``f`` with 64-bit types off, whatever the caller's setting.

    Indices and accumulators are 32-bit by design; with ``jax_enable_x64`` every
    ``arange`` and ``zeros`` would silently become 64-bit instead.
    """

    @functools.wraps(f)
    def wrapped(*args: A.args, **kwargs: A.kwargs) -> R:
        with jax.enable_x64(False):
            return f(*args, **kwargs)

    return wrapped


def silence_triton_deprecation() -> None:
    """Silences JAX's notice that the Triton back end will be removed.

    The only place that knows about it; every Triton kernel calls this before it is
    traced. The notice is given while lowering, after the kernel's function has
    returned, so that the filter has to outlive the call. It names that one message.
    """
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")


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
