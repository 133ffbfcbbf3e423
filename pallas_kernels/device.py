"""The device at hand, and what serves each operation on it.

``python -c "import pallas_kernels.device as d; print(d.describe())"`` prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from pallas_kernels._common.devices import (
    current_compute_capability,
    current_device_kind,
    current_platform,
    require_cuda,
)
from pallas_kernels.dispatch import Implementation, candidates, tuned_record
from pallas_kernels.probes import PROBES, Probe

__all__ = [
    "DeviceReport",
    "ServedOp",
    "current_compute_capability",
    "current_device_kind",
    "current_platform",
    "describe",
    "require_cuda",
]


@dataclasses.dataclass(frozen=True)
class ServedOp:
    """What serves one operation.

    Attributes:
      op: its name.
      sizes: the calls that this is about, where a record tells calls apart.
      implementation: what serves them.
      why: the reason, in words.
      refused: implementations that come first and do not serve here, with the reason.
    """

    op: str
    sizes: Mapping[str, object]
    implementation: Implementation
    why: str
    refused: Mapping[str, str]

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        name = f"{self.op} ({sizes})" if sizes else self.op
        lines = [f"{name}: {self.implementation}: {self.why}"]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class DeviceReport:
    """A device and what serves each operation on it.

    Attributes:
      kind: its kind as JAX names it, such as "NVIDIA H200" or "cpu".
      platform: "cuda", "cpu", ...
      compute_capability: of a CUDA device, if known.
      jax_version: of the JAX that asks.
      ops: one entry an operation, or one for each kind of call that is served
        differently.
    """

    kind: str
    platform: str
    compute_capability: float | None
    jax_version: str
    ops: tuple[ServedOp, ...]

    def __str__(self) -> str:
        capability = self.compute_capability
        about = f", compute capability {capability}" if capability is not None else ""
        head = f"{self.kind} ({self.platform}{about}), jax {self.jax_version}"
        return "\n".join([head, *map(str, self.ops)])


def describe() -> DeviceReport:
    """What serves each operation on the device that a call would run or lower for.

    Nothing is run: each implementation is asked, in the order in which ``dispatch``
    tries them, whether it takes a small call of typical sizes. Other sizes may be
    refused where these are not (a head dim that a kernel cannot tile).

    Example:
      >>> from pallas_kernels.device import describe
      >>> describe().ops[0].implementation in ("mosaic_gpu", "triton", "xla")
      True
    """
    ops: dict[str, ServedOp] = {}
    for op, probes in PROBES.items():
        for probe in probes:
            served = _served(op, probe)
            ops.setdefault(str(served), served)
    return DeviceReport(
        kind=current_device_kind(),
        platform=current_platform(),
        compute_capability=current_compute_capability(),
        jax_version=jax.__version__,
        ops=tuple(ops.values()),
    )


def _served(op: str, probe: Probe) -> ServedOp:
    order = candidates(op, None, probe.sizes)
    record = tuned_record(op, current_device_kind())
    why = f"recorded with jax {record['jax']}" if record else "no record of this device"
    refused: dict[str, str] = {}
    for name in order:
        refusal = None if name == "xla" else probe.refusal(name)
        if refusal is None:
            break
        refused[name] = refusal
    else:
        raise AssertionError(f"nothing serves {op}; xla does not refuse")
    sizes = probe.sizes if record.get("orders") else {}
    return ServedOp(op, sizes, name, why, refused)
