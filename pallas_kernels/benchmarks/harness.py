"""Timing and reporting for the benchmarks.

Short kernels are timed as a chain inside one compiled call (each link on another
layer of a stack, so that nothing is served from cache), and the time of the chain is
divided by its length: what is left of launch gaps is part of the figure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Timing:
    """Times of one variant.

    Attributes:
      name: what was timed.
      seconds: median time of one call.
      spread: half the distance between the quartiles, over the median.
      note: a figure derived from it, in words.
      error: why there is no time, if there is none.
    """

    name: str
    seconds: float | None
    spread: float | None = None
    note: str = ""
    error: str = ""


def measure(
    name: str,
    f: Callable[..., Any],
    *args: Any,
    links: int = 1,
    repeats: int = 10,
    note: Callable[[float], str] = lambda seconds: "",
) -> Timing:
    """Compiles ``f``, runs it once to warm up, then times it.

    Args:
      name: what is timed.
      f: function of ``args``.
      *args: arrays.
      links: operations chained in one call of ``f``.
      repeats: timed calls.
      note: turns seconds into a derived figure.

    Returns:
      The times, or the error, since one variant's failure must not lose the others.
    """
    try:
        compiled = jax.jit(f).lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times.append((time.perf_counter() - begin) / links)
    except Exception as error:
        result = Timing(name, None, error=f"{type(error).__name__}: {error}"[:300])
        print(f"{name:44s} failed: {result.error}", flush=True)
        return result
    median = statistics.median(times)
    spread = 0.0
    if len(times) > 3:
        low, _, high = statistics.quantiles(times, n=4)
        spread = (high - low) / 2 / median
    result = Timing(name, median, spread, note(median))
    print(
        f"{name:44s} {median * 1e3:10.4f} ms  ±{spread:5.1%}  {result.note}", flush=True
    )
    return result


def device_kernels(f: Callable[..., Any], *args: Any) -> dict[str, tuple[int, float]]:
    """Kernels of one call of ``f`` on a GPU: name to (launches, seconds in all).

    Read from a profile, so that launch gaps are not part of the figures. Empty where
    the profile names no GPU stream.
    """
    compiled = jax.jit(f).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*args))
        found: dict[str, tuple[int, float]] = {}
        for path in Path(folder).rglob("*.trace.json.gz"):
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            names = {
                (e["pid"], e.get("tid")): e["args"]["name"]
                for e in events
                if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
            }
            for e in events:
                stream = names.get((e.get("pid"), e.get("tid")), "")
                if e.get("ph") == "X" and "Stream" in stream:
                    count, total = found.get(e["name"], (0, 0.0))
                    found[e["name"]] = (count + 1, total + e.get("dur", 0.0) / 1e6)
    return found


def copy_bandwidth(gib: float = 8.0) -> float:
    """Bytes a second that a large device copy moves, reads and writes counted."""
    x = jnp.ones((int(gib * 2**30) // 4,), jnp.float32)
    # A jitted negation reads and writes every byte; an identity would be elided.
    timing = measure("copy bandwidth", lambda x: -x, x)
    assert timing.seconds is not None, timing.error
    return 2 * x.nbytes / timing.seconds


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="folder for the JSON file and plot")
    parser.add_argument("--small", action="store_true", help="sizes that suit a CPU")
    return parser


def report(op: str, timings: Sequence[Timing], out: Path | None, **extra: Any) -> None:
    """Writes ``<op>.json`` and, where matplotlib is there, ``<op>.png``.

    Args:
      op: name of the operation.
      timings: what was measured.
      out: folder, or None to write nothing.
      **extra: further entries of the JSON file.
    """
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "op": op,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **extra,
        "timings": [asdict(t) for t in timings],
    }
    text = json.dumps(record, indent=1) + "\n"
    (out / f"{op}.json").write_text(text, encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    done = [t for t in timings if t.seconds is not None]
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(done)), layout="constrained")
    axes = figure.subplots()
    axes.barh([t.name for t in done], [(t.seconds or 0.0) * 1e3 for t in done])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{op}, {record['device']}, jax {jax.__version__}")
    figure.savefig(out / f"{op}.png", dpi=120)
