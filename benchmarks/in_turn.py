"""Benchmarks one after the other in one process: a start of JAX serves all of them.

    python -m benchmarks.in_turn '[["NAME", "MODULE", "ARGUMENT", ...], ...]'

`run_in_turn` starts that command for `benchmarks.all`, watches it, and starts it anew
for what is left where a benchmark failed or was ended: what a failure leaves behind in
a process is nobody's measurement.
"""

import gc
import json
import pathlib
import queue
import runpy
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sparda_jax.cli.options import Parser

# What a line begins with that says where a process stands.
_MARK = "== in turn: "


class Run(NamedTuple):
    """One benchmark to run.

    Attributes:
      name: Of its result.
      words: Its module and arguments.
      file: What it writes its figures to.
      seconds: When it is ended.
    """

    name: str
    words: tuple[str, ...]
    file: pathlib.Path
    seconds: float


class Ended(NamedTuple):
    """How a benchmark ended.

    Attributes:
      name: Of its result.
      status: Its exit status; None where it was ended, or is still running.
      seconds: What it took, with the start of its process if that was its own.
      printed: What it printed.
    """

    name: str
    status: int | None
    seconds: float
    printed: str


def run_in_turn(
    runs: Sequence[Run],
    seconds: float,
    on_change: Callable[[Ended], None] = lambda so_far: None,
) -> Iterator[Ended]:
    """Runs benchmarks in one process; yields how each ended, in their order.

    Args:
      runs: What to run. One that does not begin in time is left out.
      seconds: When all are ended.
      on_change: Told how far a benchmark is whenever it has written figures.
    """
    end, left = time.monotonic() + seconds, list(runs)
    while left and time.monotonic() < end:
        told: queue.Queue[str | None] = queue.Queue()
        commands = json.dumps([[run.name, *run.words] for run in left])
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.in_turn", commands],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        reader = threading.Thread(target=_read, args=(process, told), daemon=True)
        reader.start()
        try:
            while left:
                ended = _watch(left[0], process, told, end, on_change)
                left.pop(0)
                yield ended
                if ended.status != 0:
                    break
        finally:
            process.kill()
            process.wait()
            # What it started itself may still hold its output.
            reader.join(5)


def _read(process: subprocess.Popen, told: "queue.Queue[str | None]") -> None:
    """Passes on what a process prints, and None behind its end."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            told.put(line)
    told.put(None)


def _watch(
    run: Run,
    process: subprocess.Popen,
    told: "queue.Queue[str | None]",
    end: float,
    on_change: Callable[[Ended], None],
) -> Ended:
    """Waits until one benchmark has ended, or ends its process."""
    begun, printed, seen = time.monotonic(), "", None
    until = min(end, begun + run.seconds)

    def now(status: int | None) -> Ended:
        return Ended(run.name, status, time.monotonic() - begun, printed)

    while (left := until - time.monotonic()) > 0:
        try:
            line = told.get(timeout=min(left, 1.0))
        except queue.Empty:
            line = ""
        if line is None:
            return now(process.wait() or 1)
        if line.startswith(_MARK):
            return now(int(line.removeprefix(_MARK)))
        if line:
            printed += line
            print(line, end="", flush=True)
        written = run.file.stat().st_mtime_ns if run.file.is_file() else None
        if written != seen:
            seen = written
            on_change(now(None))
    process.kill()
    return now(None)


def _status(words: Sequence[str]) -> int:
    """Runs a module as a command; returns its exit status."""
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, flush=True)
        return 1
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for, up to the first that fails."""
    parser = Parser("python -m benchmarks.in_turn", description=__doc__)
    parser.add_argument("commands", type=json.loads, help="as the text above has them")
    for _, *words in parser.parse_args(argv).commands:
        status = _status(words)
        print(f"\n{_MARK}{status}", flush=True)
        if status:
            return status
        if (jax := sys.modules.get("jax")) is not None:
            jax.clear_caches()
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
