"""Draws what a JAX profile holds over time: which kernels ran beside which.

    python -m benchmarks.timeline FOLDER --out timeline.png    # of jax.profiler.trace

On a GPU a row is a stream, and fetches from host memory are told from other kernels. A
CPU has no streams: a row is a thread, and copies and gathers are told from the rest.
"""

import argparse
import gzip
import json
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.profile_streams import (
    device_events,
    is_fetch,
    merged_spans,
    shared_time,
)
from sparda_jax.checkpoint.atomic import new_file
from sparda_jax.checks import ConfigError, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_file_option, add_option
from sparda_jax.evaluation import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What XLA's threads on a CPU run that is no operation, or holds other operations.
_NO_OPERATION = re.compile(r"(while|call|conditional)[.\d]*$|.*::|end: |Threadpool")
_MOVES = re.compile(r"(\w*_)?(gather|copy|scatter|slice|dynamic)")


class Span(NamedTuple):
    """An operation in a profile.

    Attributes:
      lane: Stream or thread.
      name: Its kernel or operation.
      begin, end: Microseconds.
      fetch: On a GPU, whether it fetches blocks from host memory; on a CPU, whether it
        copies or gathers.
    """

    lane: str
    name: str
    begin: float
    end: float
    fetch: bool


def read_spans(folder: pathlib.Path) -> list[Span]:
    """All operations of a profile, in the order in which they began.

    Args:
      folder: What `jax.profiler.trace` wrote.

    Raises:
      ConfigError: If it holds no operations.
    """
    found = [
        Span(lane, name, begin, begin + took, is_fetch(name))
        for lane, name, begin, took in device_events(folder)
    ] or _cpu_spans(folder)
    if not found:
        raise ConfigError(f"{str(folder)!r} is not allowed: no profile with operations")
    return sorted(found, key=lambda span: span.begin)


def _cpu_spans(folder: pathlib.Path) -> list[Span]:
    found = []
    for path in sorted(folder.rglob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        threads = {
            (e["pid"], e["tid"]): e["args"]["name"]
            for e in events
            if e.get("ph") == "M" and e["name"] == "thread_name"
        }
        for event in events:
            thread = threads.get((event.get("pid"), event.get("tid")), "")
            if event.get("ph") != "X" or not thread.startswith("tf_XLA"):
                continue
            name, begin = event["name"], event["ts"]
            if _NO_OPERATION.match(name) is None:
                end = begin + event.get("dur", 0.0)
                moves = _MOVES.match(name) is not None
                found.append(Span(f"thread {event['tid']}", name, begin, end, moves))
    return found


def middle_part(spans: Sequence[Span], length: float) -> list[Span]:
    """Those that begin in `length` microseconds around the operation in the middle."""
    middle = spans[len(spans) // 2].begin
    return [span for span in spans if abs(span.begin - middle) <= length / 2]


def overlap(spans: Sequence[Span]) -> tuple[float, float]:
    """Time in fetches, and how much of it other operations ran beside them, us."""
    fetch = merged_spans([(s.begin, s.end) for s in spans if s.fetch])
    rest = merged_spans([(s.begin, s.end) for s in spans if not s.fetch])
    return sum(end - begin for begin, end in fetch), shared_time(fetch, rest)


def draw(figure: "Figure", spans: Sequence[Span], *, title: str = "") -> None:
    """A row a stream, or thread: fetches high and hatched, all else low and plain."""
    lanes = sorted({span.lane for span in spans})
    first = min(span.begin for span in spans)
    axes = figure.subplots()
    for fetch, label in ((False, "other operations"), (True, "fetch or copy")):
        for row, lane in enumerate(lanes):
            bars = [
                (span.begin - first, span.end - span.begin)
                for span in spans
                if span.lane == lane and span.fetch == fetch
            ]
            axes.broken_barh(
                bars,
                (row - 0.4, 0.8) if fetch else (row - 0.25, 0.5),
                facecolor=plots.style(int(fetch))["color"],
                hatch="///" if fetch else None,
                label=label if row == 0 else None,
            )
    axes.set_yticks(range(len(lanes)), [lane[:28] for lane in lanes])
    axes.set(xlabel="µs", title=title)
    axes.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, -0.15))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    add_file_option(parser, "--out", help="a .png", required=True)
    add_option(
        parser,
        "--length",
        number(above=0.0),
        metavar="X",
        default=2000,
        help="microseconds shown",
    )
    return run_command(lambda: _draw_profile(parser.parse_args(argv)))


def _draw_profile(arguments: argparse.Namespace) -> None:
    spans = read_spans(arguments.folder)
    took, hidden = overlap(spans)
    print(f"fetches or copies {took:.0f} us, {hidden:.0f} us beside other operations")
    shown = middle_part(spans, arguments.length)
    picture = plots.png(lambda figure: draw(figure, shown), size=(10, 3))
    with new_file(arguments.out) as temporary:
        pathlib.Path(temporary).write_bytes(picture)


if __name__ == "__main__":
    raise SystemExit(main())
