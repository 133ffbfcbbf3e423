"""Timing and reporting for the benchmarks.

On a GPU the time of a call is the sum of its kernels' durations in a profile: launch
gaps and the host are no part of it. Elsewhere it is the wall clock, and so it is for
calls of more than a fifth of a second, whose profiles overflow. Short kernels are
timed as a chain inside one compiled call (each link on another layer of a stack, so
that nothing is served from cache), and the time of the chain is divided by its length.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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

from pallas_kernels._common.cache import write_json
from pallas_kernels._common.command import Parser

# A call that takes longer is timed by the wall clock, and not often.
SLOW_CALL = 0.2


@dataclass(frozen=True)
class Timing:
    """Times of one variant.

    Attributes:
      name: what was timed.
      seconds: median time of one call, on the device where it is a GPU.
      spread: half the distance between the quartiles, over the median.
      wall_seconds: median time by the wall clock, launches and gaps included.
      note: a figure derived from it, in words.
      error: why there is no time, if there is none.
    """

    name: str
    seconds: float | None
    spread: float | None = None
    wall_seconds: float | None = None
    note: str = ""
    error: str = ""


def compile_side_by_side(
    calls: Sequence[Callable[..., Any]], operands: Sequence[Any]
) -> list[Any]:
    """Compiles functions of the same operands, several at a time.

    Args:
      calls: functions, not compiled.
      operands: arrays that all of them take.

    Returns:
      What `measure` takes for each of them: compiled, or the error that stands for it.
    """
    return compile_all([(call, operands) for call in calls])


def compile_all(
    calls: Sequence[tuple[Callable[..., Any], Sequence[Any]]],
) -> list[Any]:
    """Compiles functions, each of its own operands, as `compile_side_by_side` does.

    Args:
      calls: functions, not compiled, with arrays that they take, or shapes of them.
    """

    def compiled(call):
        f, operands = call
        try:
            return jax.jit(f).lower(*operands).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(compiled, calls))


def measure(
    name: str,
    f: Callable[..., Any] | Exception,
    *args: Any,
    links: int = 1,
    repeats: int = 10,
    note: Callable[[float], str] = lambda seconds: "",
) -> Timing:
    """Compiles ``f``, runs it once to warm up, then times it.

    Args:
      name: what is timed.
      f: function of ``args``, compiled or not, or the error of compiling it.
      *args: arrays.
      links: operations chained in one call of ``f``.
      repeats: timed calls; at most 5 of a slow one.
      note: turns seconds into a derived figure.

    Returns:
      The times, or the error, since one variant's failure must not lose the others.
    """
    try:
        if isinstance(f, Exception):
            raise f
        compiled = f
        if not isinstance(f, jax.stages.Compiled):
            compiled = jax.jit(f).lower(*args).compile()
        jax.block_until_ready(compiled(*args))

        def wall() -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            return time.perf_counter() - begin

        first = wall()
        slow = first > SLOW_CALL
        repeats = min(repeats, 5) if slow else repeats
        walls = [t / links for t in (first, *(wall() for _ in range(repeats - 1)))]
        times = walls
        if jax.default_backend() == "gpu" and not slow:
            times = [t / links for t in _device_times(compiled, args, repeats)] or walls
    except Exception as error:
        result = Timing(name, None, error=f"{type(error).__name__}: {error}"[:300])
        print(f"{name:44s} failed: {result.error}", flush=True)
        return result
    median = statistics.median(times)
    spread = 0.0
    if len(times) > 3:
        low, _, high = statistics.quantiles(times, n=4)
        spread = (high - low) / 2 / median
    median_wall = statistics.median(walls)
    result = Timing(name, median, spread, median_wall, note(median))
    print(
        f"{name:44s} {median * 1e3:10.4f} ms  ±{spread:5.1%}  "
        f"(wall {median_wall * 1e3:.4f})  {result.note}",
        flush=True,
    )
    return result


def _device_events(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Events on GPU streams while ``run`` runs, in the order of their start."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        found = []
        for path in Path(folder).rglob("*.trace.json.gz"):
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            names = {
                (e["pid"], e.get("tid")): e["args"]["name"]
                for e in events
                if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
            }
            found += [
                e
                for e in events
                if e.get("ph") == "X"
                and "Stream" in names.get((e.get("pid"), e.get("tid")), "")
            ]
    return sorted(found, key=lambda e: e["ts"])


def _device_times(compiled: Callable[..., Any], args: Any, calls: int) -> list[float]:
    """Seconds that the kernels of each call take; empty without a usable profile."""

    def run():
        for _ in range(calls):
            jax.block_until_ready(compiled(*args))

    events = _device_events(run)
    if not events or len(events) % calls:
        return []
    each = len(events) // calls
    return [
        sum(e.get("dur", 0.0) for e in events[i * each : (i + 1) * each]) / 1e6
        for i in range(calls)
    ]


def device_kernels(f: Callable[..., Any], *args: Any) -> dict[str, tuple[int, float]]:
    """Kernels of one call of ``f`` on a GPU: name to (launches, seconds in all)."""
    compiled = f
    if not isinstance(f, jax.stages.Compiled):
        compiled = jax.jit(f).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    found: dict[str, tuple[int, float]] = {}
    for e in _device_events(lambda: jax.block_until_ready(compiled(*args))):
        count, total = found.get(e["name"], (0, 0.0))
        found[e["name"]] = (count + 1, total + e.get("dur", 0.0) / 1e6)
    return found


def copy_bandwidth(gib: float = 8.0) -> float:
    """Bytes a second that a large device copy moves, reads and writes counted.

    The better of a kernel that reads and writes every byte and the driver's own copy.
    """
    x = jnp.ones((int(gib * 2**30) // 4,), jnp.float32)

    def note(seconds):
        return f"{2 * x.nbytes / seconds / 1e9:7.1f} GB/s"

    # An identity would be elided.
    timings = [
        measure("copy bandwidth, kernel", lambda x: -x, x, note=note),
        measure("copy bandwidth, memcpy", lambda x: jnp.array(x), x, note=note),
    ]
    seconds = [t.seconds for t in timings if t.seconds is not None]
    return 2 * x.nbytes / min(seconds)


def small_copy_bandwidth(size: int) -> float:
    """Bytes a second of a device copy that moves ``size`` bytes, as short kernels do.

    Half of them are read and half written, from and to other memory in every copy.
    """
    count = max(4, int(4e8 // size))
    xs = jnp.ones((count, size // 8), jnp.float32)

    def copies(xs):
        return [-xs[i] for i in range(count)]

    timing = measure(f"copy of {size / 1e6:.1f} MB", copies, xs, links=count)
    assert timing.seconds is not None, timing.error
    return size / timing.seconds


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = Parser(description=description)
    parser.add_argument("--out", type=Path, help="folder for the JSON file and plot")
    parser.add_argument("--small", action="store_true", help="sizes that suit a CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        help="leave out what would not end in this time, and name it",
    )
    return parser


class Report:
    """The rows of a benchmark, in ``<op>.json`` as soon as each of them is there.

    Attributes:
      timings: what was measured.
      left_out: cases for which there was no time.
    """

    def __init__(self, op: str, args: argparse.Namespace):
        """Starts an empty report.

        Args:
          op: name of the operation.
          args: what `arguments` parsed: where to write, and how long it may take.
        """
        self.timings: list[Timing] = []
        self.left_out: list[str] = []
        self._op, self._out = op, args.out
        self._extra: dict[str, Any] = {}
        self._seconds = float("inf") if args.seconds is None else args.seconds
        self._begun = time.monotonic()
        self._mark: float | None = None
        self._longest = 0.0

    def has_time(self, case: str) -> bool:
        """Whether a case may begin, asked before each of them.

        The first one always may, and further ones where as much time is left as the
        longest took. A case that may not is said, and stands in the JSON file.
        """
        now, first = time.monotonic(), self._mark is None
        if self._mark is not None:
            self._longest = max(self._longest, now - self._mark)
        self._mark = now
        if first or now - self._begun + self._longest <= self._seconds:
            return True
        self.left_out.append(case)
        print(f"{case}: left out, the time is up", flush=True)
        self._write()
        return False

    def add(self, timing: Timing) -> Timing:
        """Takes in a row and writes the JSON file; returns the row."""
        self.timings.append(timing)
        self._write()
        return timing

    def add_entries(self, **extra: Any) -> None:
        """Adds further entries to the JSON file.

        Args:
          **extra: the entries.
        """
        self._extra |= extra

    def finish(self) -> None:
        """Writes the JSON file and, where matplotlib is there, ``<op>.png``."""
        self._write()
        if self._out is not None:
            self._plot(self._out / f"{self._op}.png")

    def _write(self) -> None:
        if self._out is None:
            return
        record = {
            "op": self._op,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            **self._extra,
            "timings": [asdict(t) for t in self.timings],
        }
        if self.left_out:
            record["left_out"] = self.left_out
        write_json(self._out / f"{self._op}.json", record)

    def _plot(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        done = [t for t in self.timings if t.seconds is not None]
        figure = Figure(figsize=(8, 0.6 + 0.35 * len(done)), layout="constrained")
        axes = figure.subplots()
        axes.barh([t.name for t in done], [(t.seconds or 0.0) * 1e3 for t in done])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        kind = jax.devices()[0].device_kind
        axes.set_title(f"{self._op}, {kind}, jax {jax.__version__}")
        figure.savefig(path, dpi=120)
