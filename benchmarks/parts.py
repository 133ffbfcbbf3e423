"""Kernel time of a profiled prefill by part, and the waits between kernels."""

import pathlib
import re

from benchmarks.profile_streams import busy_time, device_events, kernel_name

PARTS = (
    ("selection", r"block_scores"),
    ("choice", r"choose_blocks|sort|top_?k"),
    ("attention", r"block_sparse_attention"),
    ("products", r"gemm|nvjet|cutlass|cublas"),
)
REST = "rest"


def part_of(kernel: str) -> str:
    """The part of a prefill that a kernel's name belongs to."""
    for part, pattern in PARTS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return part
    return REST


def largest_gaps(events: list[tuple], most: int) -> list[dict]:
    """Time in which no kernel ran, by the kernels before and behind it.

    Args:
      events: Stream, kernel, begin and duration (in us).
      most: Pairs to list.
    """
    gaps: dict[tuple[str, str], list[float]] = {}
    ordered = sorted(events, key=lambda event: event[2])
    last, end = ordered[0][1], ordered[0][2]
    for _, name, begin, duration in ordered:
        if begin > end:
            pair = kernel_name(last), kernel_name(name)
            gaps.setdefault(pair, []).append((begin - end) / 1e3)
        if begin + duration > end:
            last, end = name, begin + duration
    largest = sorted(gaps.items(), key=lambda entry: -sum(entry[1]))[:most]
    return [
        {
            "behind": before,
            "before": after,
            "milliseconds": sum(times),
            "longest_ms": max(times),
            "times": len(times),
        }
        for (before, after), times in largest
    ]


def by_part(folder: pathlib.Path, most: int) -> dict:
    """Kernel time of a profile by part, in milliseconds, and the largest of the rest.

    Args:
      folder: What `jax.profiler.trace` wrote.
      most: Kernels of the rest to list.

    Raises:
      ValueError: If the profile holds none, as on a CPU.
    """
    parts = dict.fromkeys([part for part, _ in PARTS] + [REST], 0.0)
    launches = dict.fromkeys(parts, 0)
    rest: dict[str, list[float]] = {}
    events = list(device_events(folder))
    if not events:
        raise ValueError("the profile holds no kernels: only GPUs give their names")
    for _, name, _, duration in events:
        part = part_of(name)
        parts[part] += duration / 1e3
        launches[part] += 1
        if part == REST:
            rest.setdefault(kernel_name(name), []).append(duration / 1e3)
    largest = sorted(rest.items(), key=lambda entry: -sum(entry[1]))[:most]
    spans = [(begin, begin + duration) for _, _, begin, duration in events]
    return {
        "milliseconds": parts,
        "launches": launches,
        "busy_ms": busy_time(spans) / 1e3,
        "span_ms": (max(e for _, e in spans) - min(b for b, _ in spans)) / 1e3,
        "largest_gaps": largest_gaps(events, most // 2),
        "largest_of_rest": [
            {"kernel": name, "milliseconds": sum(times), "launches": len(times)}
            for name, times in largest
        ],
    }
