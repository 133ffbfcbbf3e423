"""What this machine runs with: the device, its kernels, memory, flags and versions."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import warnings
from typing import Any

from pallas_kernels.device import DeviceReport, ServedOp, describe, records_directory
from sparda_jax.cache.memory import HOST_KIND
from sparda_jax.checkpoint.fetch import cache_directory
from sparda_jax.checks import flag
from sparda_jax.machine import Limit, physical_memory, size_text
from sparda_jax.mesh import present_devices
from sparda_jax.planning.measure import measure_rates
from sparda_jax.planning.rates import Rates, recorded_rates
from sparda_jax.runtime import COMMAND_BUFFERS, HOST_LIMIT

_PACKAGES = ("sparda-jax", "jax", "jaxlib", "flax", "numpy")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_FLAGS = (
    "XLA_FLAGS",
    HOST_LIMIT,
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "JAX_PLATFORMS",
)
# What XLA pins at most where nothing is set.
_PINNED_BY_DEFAULT = 64 * 2**30

_NO_RECORD = (
    "('no record of this device': kernels were not timed on it, so what serves is XLA, "
    "or what was fastest on the nearest device; nothing is wrong. On a CUDA GPU "
    "`sparda tune` makes a record.)"
)


@dataclasses.dataclass(frozen=True)
class MachineReport:
    """What `describe_device` finds.

    Attributes:
      versions: Of Python and the packages that matter.
      device: The default device and, per operation, what serves it here and why.
      devices: How many of its kind JAX has.
      device_bytes: What JAX may take of its memory; None if it does not tell.
      memory_kinds: Its kinds of memory; offloaded KV needs "pinned_host".
      host: The machine's memory, or what its container may use; None if not told.
      pinned_bytes: Most that may be pinned for offloaded KV; None on a CPU.
      flags: Settings of the environment, "" for what is not set.
      rates: Link, fetch and memory rates, recorded or measured; None for neither.
      directories: Where things are kept, and whether they can be written to.
      problems: What costs speed or does not work, a line each.
    """

    versions: dict[str, str]
    device: DeviceReport
    devices: int
    device_bytes: int | None
    memory_kinds: tuple[str, ...]
    host: Limit | None
    pinned_bytes: int | None
    flags: dict[str, str]
    rates: Rates | None
    directories: dict[str, bool]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        def size(value: int | None) -> str:
            return "not told" if value is None else size_text(value)

        kinds = ", ".join(self.memory_kinds) or "none"
        lines = [
            *(f"{name} {version}" for name, version in self.versions.items()),
            "",
            f"{self.devices} device(s): {self.device}",
            *([_NO_RECORD] if any(map(_unrecorded, self.device.ops)) else []),
            "",
            f"device memory for JAX: {size(self.device_bytes)}; kinds: {kinds}",
            f"host memory: {self.host or 'not told'}",
            f"pinned at most: {size(self.pinned_bytes)}",
            _rates_text(self.rates),
            "",
            *(f"{name}={value or '(not set)'}" for name, value in self.flags.items()),
            *(
                f"{path}: {'writable' if good else 'CANNOT be written to'}"
                for path, good in self.directories.items()
            ),
            "",
            *(f"problem: {problem}" for problem in self.problems),
        ]
        return "\n".join([*lines, *([] if self.problems else ["no problems found"])])

    def as_json(self) -> dict[str, Any]:
        """The report as what `json` writes."""
        return dataclasses.asdict(
            dataclasses.replace(
                self,
                device=dataclasses.replace(
                    self.device,
                    ops=tuple(
                        dataclasses.replace(
                            op, sizes=dict(op.sizes), refused=dict(op.refused)
                        )
                        for op in self.device.ops
                    ),
                ),
            )
        )


def _unrecorded(op: ServedOp) -> bool:
    return op.why.startswith("no record")


def _rates_text(rates: Rates | None) -> str:
    if rates is None:
        return "link: not recorded for this device; --measure measures it"
    link = "" if rates.link is None else f"link {rates.link / 1e9:.1f} GB/s, "
    return (
        f"{link}listed blocks {rates.fetch / 1e9:.1f} GB/s by {rates.route}, device "
        f"memory {rates.memory / 1e9:,.0f} GB/s: {rates.source}"
    )


def describe_device(*, measure: bool = False) -> MachineReport:
    """What runs here, how, and what stands in the way.

    Nothing is run but kernels that no record vouches for, once
    (`pallas_kernels.proof`), and what `measure` asks for.

    Args:
      measure: Also measure the link and the device's memory: some seconds, and 1 GiB of
        pinned memory on a GPU.

    Raises:
      ConfigError: If JAX cannot start its devices.

    Example:
      >>> import sparda_jax as sj
      >>> sj.describe_device().memory_kinds[0]
      'device'
    """
    measure = flag("measure", measure)
    found = present_devices()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        device = describe()
    default = found[0]
    gpu = default.platform == "gpu"
    kinds = tuple(memory.kind for memory in default.addressable_memories())
    host = physical_memory()
    flags = {name: os.environ.get(name, "") for name in _FLAGS}
    folders = (cache_directory(), records_directory())
    directories = {str(folder): _writable(folder) for folder in folders}
    rates = measure_rates().rates if measure else recorded_rates(default.device_kind)
    problems = [str(warning.message) for warning in told]
    problems += _problems(device, gpu, kinds, flags, directories)
    stats = default.memory_stats() or {}
    return MachineReport(
        versions=_versions(default),
        device=device,
        devices=sum(x.device_kind == default.device_kind for x in found),
        device_bytes=stats.get("bytes_limit"),
        memory_kinds=kinds,
        host=host,
        pinned_bytes=_pinned_bytes(flags[HOST_LIMIT], host) if gpu else None,
        flags=flags,
        rates=rates,
        directories=directories,
        problems=tuple(problems),
    )


def _pinned_bytes(limit: str, host: Limit | None) -> int:
    size = _PINNED_BY_DEFAULT
    if limit.isdigit():
        size = int(limit) * 2**30
    return size if host is None else min(size, host.size)


def _versions(device: Any) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in _PACKAGES:
                found[name] = "(not installed)"
    # The client names the driver's and CUDA's versions on lines of their own.
    client = " ".join(str(device.client.platform_version).split())
    return found | {"platform": client}


def _writable(folder: pathlib.Path) -> bool:
    """Whether files can be put into a folder, or it can be made; nothing is made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _problems(
    device: DeviceReport,
    gpu: bool,
    kinds: tuple[str, ...],
    flags: dict[str, str],
    directories: dict[str, bool],
) -> list[str]:
    found = []
    for path, good in directories.items():
        if not good:
            found.append(
                f"{path} cannot be written to: nothing is kept there for later "
                "processes (SPARDA_CACHE and PALLAS_KERNELS_CACHE name others)"
            )
    if not gpu:
        return found
    if HOST_KIND not in kinds:
        found.append(f"no memory of kind {HOST_KIND!r}: KV cannot be offloaded")
    if COMMAND_BUFFERS not in flags["XLA_FLAGS"]:
        found.append(
            f"XLA_FLAGS lacks {COMMAND_BUFFERS}: fetches will not run beside compute "
            "(sparda_jax.configure_offload() before JAX starts)"
        )
    for op in device.ops:
        if op.implementation == "xla" and op.refused:
            reasons = "; ".join(op.refused.values())
            found.append(f"{op.op} is served by XLA: {reasons}")
    return found
