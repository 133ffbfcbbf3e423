"""Which implementation serves a call, and the recorded settings it runs with.

``tuned/<device>/<op>.json`` is the record of one device kind, in this package or in the
user's cache directory, which comes first::

    {"device": "NVIDIA H200", "jax": "0.11.2", "default": ["mosaic_gpu", "xla"],
     "orders": [{"when": {"softmax": true}, "default": ["triton", "xla"]}],
     "configs": {"triton": [{"when": {"H": 128}, "config": {"block_kv": 64}}]}}

``default`` lists the implementations tried in that order when the caller names none;
an implementation is put there only after its numerics and its timing were recorded
on that device kind. ``orders``, where there are any, replace it for calls of their
sizes. ``configs`` holds tile sizes by implementation: the first entry
whose ``when`` holds for the call's sizes is used.

A GPU without a record is served as the recorded one that is nearest by compute
capability, as far as its class allows: from 9.0 on Mosaic GPU and Triton, from 8.0 on
Triton, before that XLA. Settings are taken over from 9.0 on; older devices have less
shared memory, and the kernels' defaults are for them. Where no record with this JAX
vouches for a kernel, it is tried first (``proof.py``).
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import jax

from pallas_kernels._common.cache import cache_directory, read_json
from pallas_kernels._common.devices import (
    capability_of,
    current_compute_capability,
    current_device_kind,
    current_platform,
    device_at_hand,
    device_slug,
)
from pallas_kernels.proof import fault_of

Implementation = Literal["mosaic_gpu", "triton", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
TUNED = Path(__file__).resolve().parent / "tuned"


@functools.cache
def tuned_record(op: str, kind: str) -> Mapping[str, Any]:
    """The JSON record of ``op`` on device kind ``kind``; empty when there is none.

    A user's own record that names an unknown implementation is not used; a warning says
    so.
    """
    own = cache_directory() / "tuned" / device_slug(kind) / f"{op}.json"
    record = read_json(own)
    if record:
        named = {*record.get("default", ()), *record.get("configs", {})}
        unknown = sorted(named - set(IMPLEMENTATIONS))
        if not unknown:
            return record
        warnings.warn(
            f"{own} names {unknown}, which are no implementations; it is not used",
            RuntimeWarning,
            stacklevel=2,
        )
    return read_json(TUNED / device_slug(kind) / f"{op}.json")


@functools.cache
def nearest_record(op: str, kind: str, capability: float | None) -> Mapping[str, Any]:
    """The record of ``op`` that is nearest to a device.

    Args:
      op: name of the operation.
      kind: the device's kind.
      capability: its compute capability; None where there is none.

    Returns:
      Its own record; without one, that of the recorded kind whose compute capability
      is nearest, by name among equals; empty where nothing is known.
    """
    record = tuned_record(op, kind)
    if record or capability is None:
        return record
    others = [
        (abs(of - capability), found["device"])
        for path in TUNED.glob(f"*/{op}.json")
        if (found := read_json(path))
        and (of := capability_of(found["device"])) is not None
    ]
    return tuned_record(op, min(others)[1]) if others else {}


def class_of(capability: float | None) -> tuple[Implementation, ...]:
    """Implementations that a class of devices may have, by compute capability."""
    if capability is None or capability < 8:
        return ("xla",)
    if capability < 9:
        return ("triton", "xla")
    return ("mosaic_gpu", "triton", "xla")


def _fits(when: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    """Whether a record's entry is for a call of these sizes."""
    return all(sizes.get(name) == size for name, size in when.items())


def tuned_config(op: str, implementation: str, sizes: Mapping[str, Any]) -> dict:
    """Recorded settings for a call of these sizes; empty when there is no entry."""
    kind, capability = current_device_kind(), current_compute_capability()
    if capability is not None and capability >= 9:
        record = nearest_record(op, kind, capability)
    else:
        record = tuned_record(op, kind)
    for entry in record.get("configs", {}).get(implementation, []):
        if _fits(entry["when"], sizes):
            return dict(entry["config"])
    return {}


def candidates(
    op: str,
    implementation: str | None,
    sizes: Mapping[str, Any] | None = None,
) -> tuple[Implementation, ...]:
    """Implementations to try, in order.

    Args:
      op: name of the operation.
      implementation: the caller's choice; it is then the only candidate.
      sizes: what the call's record may tell apart.

    Raises:
      ValueError: when ``implementation`` is not a known name.
    """
    if implementation is None:
        return choice(op, sizes).order
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; allowed: None or one of "
            f"{IMPLEMENTATIONS}"
        )
    return (cast(Implementation, implementation),)


class Choice(NamedTuple):
    """Implementations to try when the caller names none.

    Attributes:
      order: their names, "xla" among them.
      why: where the order is from, in words.
      recorded: the device's own record says so.
    """

    order: tuple[Implementation, ...]
    why: str
    recorded: bool


def choice(op: str, sizes: Mapping[str, Any] | None = None) -> Choice:
    """What ``dispatch`` tries for calls of these sizes, and why.

    Args:
      op: name of the operation.
      sizes: what the call's record may tell apart.
    """
    kind, capability = current_device_kind(), current_compute_capability()
    record = nearest_record(op, kind, capability)
    order = tuple(record.get("default", ()))
    for entry in record.get("orders", ()):
        if _fits(entry["when"], sizes or {}):
            order = tuple(entry["default"])
            break
    recorded = bool(tuned_record(op, kind))
    if recorded:
        why = f"recorded with jax {record.get('jax')}"
    else:
        order = tuple(name for name in order if name in class_of(capability))
        why = "no record of this device"
        if record and capability is not None:
            why += f", of compute capability {capability}; "
            why += f"the nearest is that of {record.get('device')}"
            if capability < 8:
                why += ", and kernels need 8.0"
    faults = {name: _fault(op, name, record) for name in order}
    order = tuple(name for name in order if faults[name] is None)
    for name, fault in faults.items():
        if fault is not None:
            why += f"; {name} is left out: {fault}"
    return Choice(order if "xla" in order else (*order, "xla"), why, recorded)


def _fault(op: str, name: str, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a kernel where a call runs; when only lowering, nothing."""
    device = device_at_hand()
    if name == "xla" or device is None:
        return None
    kind, version = device.device_kind, jax.__version__
    if record.get("device") == kind and record.get("jax") == version:
        return None
    return fault_of(op, name, device)


def dispatch[T](
    op: str,
    implementation: str | None,
    run: Callable[[Implementation], T],
    sizes: Mapping[str, Any] | None = None,
) -> T:
    """Calls ``run`` with the first candidate that does not refuse.

    Args:
      op: name of the operation.
      implementation: the caller's choice, or None.
      run: takes an implementation's name; raises NotImplementedError to refuse.
      sizes: what the call's record may tell apart.

    Raises:
      NotImplementedError: when the caller's own choice refuses, or all do.
      ValueError: when ``implementation`` is not a known name.
    """
    refused: list[str] = []
    order = candidates(op, implementation, sizes)
    for name in order:
        if name == "xla" and implementation is None and current_platform() == "cuda":
            why = choice(op, sizes)
            if refused or not why.recorded:
                _tell(op, current_device_kind(), "; ".join([why.why, *refused]))
        try:
            return run(name)
        except NotImplementedError as error:
            refused.append(str(error))
    raise NotImplementedError("; ".join(refused))


@functools.cache
def _tell(op: str, kind: str, why: str) -> None:
    """Says once, in the log, that XLA serves a call where a kernel was to."""
    logging.getLogger(__name__).warning("%s on %s runs as XLA: %s", op, kind, why)
