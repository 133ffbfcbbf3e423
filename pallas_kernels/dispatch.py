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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pallas_kernels._common.devices import current_device_kind, device_slug

Implementation = Literal["mosaic_gpu", "triton", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
TUNED = Path(__file__).resolve().parent / "tuned"


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
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation is {implementation!r}; allowed: None or one of "
                f"{IMPLEMENTATIONS}"
            )
        return (cast(Implementation, implementation),)
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
    refused = []
    for name in candidates(op, implementation, sizes):
        try:
            return run(name)
        except NotImplementedError as error:
            refused.append(str(error))
    raise NotImplementedError("; ".join(refused))
