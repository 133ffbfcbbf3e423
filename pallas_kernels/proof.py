"""The first use of a kernel on a device: is it right there?

Records say so for the device kinds and JAX versions that they were made with. Anywhere
else each kernel runs the small calls of ``probes`` once, in seconds, and is compared
with the XLA form; the verdict is kept in the cache directory, by device kind and JAX
version. A kernel that is wrong, or does not run, is left out with a warning.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common.cache import cache_directory, read_json, write_json
from pallas_kernels._common.devices import device_slug
from pallas_kernels._common.tolerances import relative_error, tolerance


def verdict_file(kind: str) -> Path:
    """Where the verdicts on a device kind are kept, for the JAX at hand."""
    return cache_directory() / "proofs" / device_slug(kind) / f"{jax.__version__}.json"


def find_fault(op: str, implementation: str) -> str | None:
    """Runs the small calls of an operation on the default device.

    Args:
      op: name of the operation.
      implementation: what is compared with the XLA form.

    Returns:
      What is wrong with it, in a line; None when nothing is. A call that it refuses
      says nothing about those that it takes.
    """
    # The probes call the operations, which ask this module.
    from pallas_kernels.probes import PROBES, Probe

    def results(probe: Probe, name: Any) -> Sequence[Any]:
        call, arrays = probe.bound(name)
        return [jnp.asarray(x) for x in jax.tree.leaves(jax.jit(call)(arrays))]

    for probe in PROBES[op]:
        want = results(probe, "xla")
        try:
            got = results(probe, implementation)
        except NotImplementedError:
            continue
        except Exception as error:
            # Whatever a compiler or a driver raises: the kernel does not run here.
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0][:200]}"
        for x, y in zip(got, want, strict=True):
            if fault := _difference(x, y, probe.lists):
                return fault
    return None


def _difference(got: Any, want: Any, lists: float | None) -> str | None:
    """What is wrong with a result; ``lists`` as in ``Probe``."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return (
            f"a result of shape {got.shape} in {got.dtype}, not {want.shape} in "
            f"{want.dtype}"
        )
    if jnp.issubdtype(want.dtype, jnp.integer):
        if lists is not None:
            got, want = jnp.sort(got, -1), jnp.sort(want, -1)
        wrong = float((got != want).any(-1).mean()) if want.ndim else float(got != want)
        return f"{wrong:.0%} of its rows are wrong" if wrong > (lists or 0.0) else None
    error, most = relative_error(got, want), 2 * tolerance(jnp.bfloat16)
    return f"relative error {error:.1e}, at most {most:.1e}" if error > most else None


@functools.cache
def fault_of(op: str, implementation: str, device: Any) -> str | None:
    """`find_fault` on a device, kept in memory and in the cache directory.

    Warns once a process and kernel that has a fault, and names it.
    """
    path = verdict_file(device.device_kind)
    kept = read_json(path).get(op, {})
    verdict = kept.get(implementation) if isinstance(kept, Mapping) else None
    if not isinstance(verdict, str):
        # A thread of its own: the caller may be in the middle of a trace.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            fault = pool.submit(_find_on, device, op, implementation).result()
        verdict = fault or "right"
        found = read_json(path)
        of_op = found.get(op)
        of_op = of_op if isinstance(of_op, dict) else {}
        # Where nothing can be kept, the next process looks again.
        with contextlib.suppress(OSError):
            write_json(path, found | {op: of_op | {implementation: verdict}})
    if verdict == "right":
        return None
    warnings.warn(
        f"{implementation} is left out for {op} on {device.device_kind}: {verdict} "
        f"(kept in {path}; delete it to try again)",
        RuntimeWarning,
        stacklevel=2,
    )
    return verdict


def _find_on(device: Any, op: str, implementation: str) -> str | None:
    with jax.default_device(device):
        return find_fault(op, implementation)
