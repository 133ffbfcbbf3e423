"""The device at hand, and what serves each operation on it.

``python -c "import pallas_kernels.device as d; print(d.describe())"`` prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from pallas_kernels._common.cache import cache_directory as records_directory
from pallas_kernels._common.devices import (
    current_compute_capability,
    current_device_kind,
    current_platform,
    device_slug,
    require_cuda,
)
from pallas_kernels.dispatch import Implementation, choice
from pallas_kernels.probes import PROBES, Probe

__all__ = [
    "DeviceReport",
    "ServedOp",
    "current_compute_capability",
    "current_device_kind",
    "current_platform",
    "describe",
    "device_slug",
    "records_directory",
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

    Each implementation is asked, in the order in which ``dispatch`` tries them, whether
    it takes a small call of typical sizes. Other sizes may be refused where these are
    not (a head dim that a kernel cannot tile). Nothing is run, but for kernels that no
    record vouches for (``proof.py``), once.

    Example:
      >>> from pallas_kernels.device import describe
      >>> describe().ops[0].implementation in ("mosaic_gpu", "triton", "xla")
      True
    """
    ops: list[ServedOp] = []
    for op, probes in PROBES.items():
        served = [_served(op, probe) for probe in probes]
        alike = [dataclasses.replace(x, sizes={}) for x in served]
        if all(x == alike[0] for x in alike):
            served = alike
        ops += [x for i, x in enumerate(served) if x not in served[:i]]
    return DeviceReport(
        kind=current_device_kind(),
        platform=current_platform(),
        compute_capability=current_compute_capability(),
        jax_version=jax.__version__,
        ops=tuple(ops),
    )


def _served(op: str, probe: Probe) -> ServedOp:
    found = choice(op, probe.sizes)
    refused: dict[str, str] = {}
    for name in found.order:
        refusal = None if name == "xla" else probe.refusal(name)
        if refusal is None:
            break
        refused[name] = refusal
    else:
        raise AssertionError(f"nothing serves {op}; xla does not refuse")
    return ServedOp(op, probe.sizes, name, found.why, refused)
