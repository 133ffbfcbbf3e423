"""Sums a JAX profile by stream and kernel: what overlapped with what.

python -m benchmarks.profile_streams FOLDER      # a folder that --profile wrote
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
from collections.abc import Sequence

from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_option


def device_events(folder: pathlib.Path):
    """Yields stream, kernel, begin and duration (in us) of a profile's device events.

    Args:
      folder: What `jax.profiler.trace` wrote.
    """
    for path in sorted(folder.rglob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {
            (e["pid"], e.get("tid")): e["args"]["name"]
            for e in events
            if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
        }
        for event in events:
            stream = names.get((event.get("pid"), event.get("tid")), "")
            if event.get("ph") == "X" and "Stream" in stream:
                yield stream, event["name"], event["ts"], event.get("dur", 0.0)


def kernel_name(name: str) -> str:
    """A kernel's name without the numbers that tell its instances apart."""
    return re.sub(r"[._]\d+", "", name)[:60]


def busy_time(spans: list[tuple[float, float]]) -> float:
    """Time that at least one of the spans covers."""
    return sum(end - begin for begin, end in merged_spans(spans))


def merged_spans(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans merged into disjoint ones."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def shared_time(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Time that lies in both."""
    total, j = 0.0, 0
    for begin, end in a:
        while j < len(b) and b[j][1] <= begin:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            total += min(end, b[k][1]) - max(begin, b[k][0])
            k += 1
    return total


def is_fetch(name: str) -> bool:
    """Whether a kernel of that name fetches blocks from host memory."""
    return "host_gather" in name


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    add_option(
        parser, "--most", integer(1), metavar="N", default=24, help="kernels to list"
    )
    return run_command(lambda: _show(parser.parse_args(argv)))


def _show(arguments: argparse.Namespace) -> None:
    """Prints a table by stream and by kernel, and the overlap of the fetch."""
    events = list(device_events(arguments.folder))
    if not events:
        raise ConfigError(f"{arguments.folder} holds no device events")
    streams = collections.defaultdict(list)
    kernels = collections.Counter()
    counts = collections.Counter()
    for stream, name, begin, duration in events:
        streams[stream].append((begin, begin + duration))
        short = kernel_name(name)
        kernels[short] += duration
        counts[short] += 1
    first = min(begin for _, _, begin, _ in events)
    last = max(begin + duration for _, _, begin, duration in events)
    print(f"span {last - first:.0f} us")
    for stream, spans in streams.items():
        busy = busy_time(spans)
        print(f"  {stream[:50]:50} {len(spans):6} events, busy {busy:9.0f} us")
    for name, total in kernels.most_common(arguments.most):
        each = total / counts[name]
        print(f"  {name:60} {total:9.0f} us  x{counts[name]:<6} {each:8.1f} us")
    fetch = merged_spans([(b, b + d) for _, n, b, d in events if is_fetch(n)])
    rest = merged_spans([(b, b + d) for _, n, b, d in events if not is_fetch(n)])
    if fetch:
        total = sum(end - begin for begin, end in fetch)
        hidden = shared_time(fetch, rest)
        print(
            f"  fetch busy {total:.0f} us, {hidden:.0f} us of it beside other kernels "
            f"({hidden / total:.0%})"
        )


if __name__ == "__main__":
    raise SystemExit(main())
