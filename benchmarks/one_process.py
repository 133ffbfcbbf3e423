"""Benchmarks one after the other in one process: a start of JAX serves all of them.

    python -m benchmarks.one_process SECONDS '[[60, 20, "MODULE", "ARGUMENT", ...]]'

The numbers are the most that a benchmark may take, and the least that the ones before
it leave to it (`share`). What it may take when it begins is put in the place of
"{seconds}" in its arguments: it leaves out what would not fit, and ends by itself.

`run_in_one_process` starts that command for `benchmarks.all`, watches it, and starts it
anew for what is left where a benchmark failed or was ended: what a failure leaves
behind in a process is nobody's measurement.
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
_MARK = "== ended: "
# Of its share of the time, what a benchmark is told that it may take.
_OF_SHARE = 0.9


class Run(NamedTuple):
    """One benchmark to run.

    Attributes:
      name: Of its result.
      words: Its module and arguments.
      file: What it writes its figures to.
      seconds: When it is ended.
      least: What those before it leave to it: its shortest form needs so much.
    """

    name: str
    words: tuple[str, ...]
    file: pathlib.Path
    seconds: float
    least: float = 0.0


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


def share(left: float, most: float, least: float, behind: float) -> float:
    """Seconds that one of several may take.

    Args:
      left: All that is left.
      most: All that it can use.
      least: What it needs.
      behind: What those behind it need.
    """
    return min(left, most, max(least, left - behind))


def run_in_one_process(
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
        commands = json.dumps([[run.seconds, run.least, *run.words] for run in left])
        still = f"{end - time.monotonic():.1f}"
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.one_process", still, commands],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        reader = threading.Thread(target=_read, args=(process, told), daemon=True)
        reader.start()
        try:
            while left:
                ended = _watch(left, process, told, end, on_change)
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
    runs: Sequence[Run],
    process: subprocess.Popen,
    told: "queue.Queue[str | None]",
    end: float,
    on_change: Callable[[Ended], None],
) -> Ended:
    """Waits until the first benchmark has ended, or ends its process."""
    run, *behind = runs
    begun, printed, seen = time.monotonic(), "", None
    needed = sum(other.least for other in behind)
    until = begun + share(end - begun, run.seconds, run.least, needed)

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
    begun = time.monotonic()
    parser = Parser("python -m benchmarks.one_process", description=__doc__)
    parser.add_argument("seconds", type=float, help="all that they may take")
    parser.add_argument("commands", type=json.loads, help="as the text above has them")
    arguments = parser.parse_args(argv)
    end, commands = begun + arguments.seconds, arguments.commands
    for place, (most, least, *words) in enumerate(commands):
        behind = sum(other[1] for other in commands[place + 1 :])
        seconds = share(end - time.monotonic(), most, least, behind)
        # Whoever watches ends it with its share; it ends by itself before that.
        told = f"{_OF_SHARE * seconds:.0f}"
        status = _status([told if word == "{seconds}" else word for word in words])
        print(f"\n{_MARK}{status}", flush=True)
        if status:
            return status
        if (jax := sys.modules.get("jax")) is not None:
            jax.clear_caches()
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
