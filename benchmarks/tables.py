"""Markdown tables of the results that `benchmarks.all` wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
_MODES = ("resident", "sparse", "sparda-none", "sparda")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _span(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"least_{name}"], row[f"most_{name}"]
    middle = row.get(f"median_{name}", row.get(f"step_{name}"))
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def _decode_rows(result: Result) -> list[list[str]]:
    figures = result["figures"]
    by_batch: dict[tuple[int, float], dict[str, Any]] = {}
    resident: dict[int, Any] = {}
    for row in figures["rows"]:
        if row["mode"].startswith("resident"):
            resident[row["batch"]] = row
        else:
            key = (row["batch"], row.get("slots") or 1.0)
            by_batch.setdefault(key, {})[row["mode"]] = row
    lines = []
    for (batch, slots), found in by_batch.items():
        modes = found | {"resident": resident.get(batch)}
        ahead, own = modes.get("sparda"), modes.get("sparse")
        cells = [_span(row, "ms") if (row := modes.get(m)) else "" for m in _MODES]
        gain = (
            "" if not (ahead and own) else f"{own['step_ms'] / ahead['step_ms']:.2f}×"
        )
        rest = ["", "", ""]
        if ahead:
            rest = [
                f"{ahead['tokens_per_second']:,.0f}",
                f"{ahead['fetched_share']:.1%}",
                f"{ahead['bound_share']:.0%}",
            ]
        lines.append(
            [
                result["device"],
                f"{figures['context']:,}",
                str(batch),
                f"{slots:g}",
                *cells,
                *rest[:1],
                gain,
                *rest[1:],
            ]
        )
    return lines


def _prefill_rows(result: Result) -> list[list[str]]:
    figures = result["figures"]
    return [
        [
            result["device"],
            f"{row['context']:,}",
            str(row["batch"]),
            f"{row['attention']}, {row['cache']}",
            f"{figures['layers']} of {figures['layers_of_preset']}",
            _span(row, "ms"),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['limit_share']:.0%}",
        ]
        for row in figures["rows"]
    ]


def _kernel_rows(result: Result) -> list[list[str]]:
    figures = result["figures"]
    return [
        [
            result["device"],
            figures["op"],
            row["name"],
            f"{row['seconds'] * 1e6:.1f} µs",
            f"± {row['spread'] or 0:.0%}",
            row["note"].strip(),
        ]
        for row in figures["timings"]
        if row["seconds"] is not None
    ]


_KINDS = {
    "decode": (
        "Offloaded decode, ms a step: median (least … most)",
        (
            *("card", "context", "batch", "slots, in budgets", "resident, own query"),
            *("own query, on demand", "Forecast, on demand", "Forecast, ahead"),
            *("tokens/s", "over own query", "of lists fetched", "of the bound"),
        ),
        _decode_rows,
    ),
    "prefill": (
        "Whole prefill, ms: median (least … most)",
        (
            *("card", "context", "batch", "attention, cache", "layers", "ms"),
            *("tokens/s", "of the limit"),
        ),
        _prefill_rows,
    ),
    "kernel": (
        "Kernels",
        ("card", "operation", "case", "time", "spread", "derived"),
        _kernel_rows,
    ),
}


def _kind(part: str) -> str:
    return part.split("_")[0]


def stale(found: Sequence[Result]) -> list[str]:
    """A line for each card and part that others were measured after, by commit.

    Args:
      found: All results.
    """
    newest: dict[str, Result] = {}
    for result in found:
        best = newest.get(result["part"])
        if best is None or result["date"] > best["date"]:
            newest[result["part"]] = result
    cards = sorted({result["device"] for result in found})
    have = {(result["device"], result["part"]): result for result in found}
    lines = []
    for card in cards:
        for part, best in sorted(newest.items()):
            mine = have.get((card, part))
            if mine is None:
                lines.append(f"{card}, {part}: not measured")
            elif mine["commit"] != best["commit"]:
                lines.append(f"{card}, {part}: not measured since {mine['commit']}")
    return lines


def tables(found: Sequence[Result]) -> str:
    """All tables, with the commands that made them.

    Args:
      found: Results, as `benchmarks.all` writes them.
    """
    lines: list[str] = []
    for kind, (title, head, rows) in _KINDS.items():
        mine = [result for result in found if _kind(result["part"]) == kind]
        if not mine:
            continue
        lines += [f"### {title}", ""]
        lines += _table(head, [row for result in mine for row in rows(result)])
        lines.append("")
        for result in mine:
            source = result["figures"].get("lists")
            about = f"; {source}" if source else ""
            cut = "" if result["status"] == 0 else "; cut short"
            lines.append(
                f"* `{result['command']}`: {result['device']}, JAX {result['jax']}, "
                f"commit {result['commit']}, {result['date'][:10]}{about}{cut}"
            )
        lines.append("")
    lines += [f"* {line}" for line in stale(found)]
    return "\n".join(lines) if lines else "nothing has been measured"
