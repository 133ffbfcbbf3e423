"""A Forecast report to read: markdown, and plots where matplotlib is installed."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparda_jax.checkpoint.atomic import write_text
from sparda_jax.evaluation import plots
from sparda_jax.evaluation.forecast_report import mean_over_domains, worst_layers

_NAMES = {
    "forecast_mass": "Forecast",
    "own_mass": "own query",
    "oracle_mass": "oracle",
}
_OURS = "forecast_mass"
_WORST_HEADS = 8
_HOW = """\
Recall: of the blocks that a layer's own queries choose (forced ones left out), the \
share that the Forecast chooses too; "at budget" counts the forced ones as well. Mass: \
attention probability in the chosen blocks. Lost: mass of the own query's lists that \
the Forecast's do not have; to the oracle: of the lists that the true attention fills. \
Overlap: share of a token's chosen blocks that the token \
before lists. Tokens whose context fits the budget do not count. Layers attend to \
their own queries' choice."""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]


def _buckets(edges: Sequence[int]) -> list[str]:
    return [f"{a}–{b - 1}" for a, b in itertools.pairwise(edges)]


def _domains(report: Mapping[str, Any]) -> list[str]:
    names = ("recall", "recall_at_budget", "forecast_mass", "own_mass", "oracle_mass")
    names = (*names, "lost", "lost_to_oracle", "overlap")
    rows = [
        [name, f"{x['rows']} × {x['tokens']}", *(x["means"][n] for n in names)]
        for name, x in report["domains"].items()
    ]
    head = ("text", "rows × tokens", "recall", "at budget", "mass", "own query")
    return _table((*head, "oracle", "lost", "to the oracle", "overlap"), rows)


def _verdict(report: Mapping[str, Any]) -> list[str]:
    checks = report.get("verdict", [])
    if not checks:
        return []
    passed = sum(check["passed"] for check in checks)
    lines = ["", f"## Thresholds: {passed} of {len(checks)} met", ""]
    return lines + _table(
        ("text", "figure", "value", "wanted", ""),
        [
            [
                x["domain"],
                x["figure"],
                x["value"],
                x["limit"],
                "met" if x["passed"] else "**NOT MET**",
            ]
            for x in checks
        ],
    )


def _layers(report: Mapping[str, Any]) -> list[str]:
    names = ("recall", "recall_at_budget", "forecast_mass", "own_mass", "oracle_mass")
    names = (*names, "lost", "lost_to_oracle", "overlap")
    columns = [mean_over_domains(report, "layers", name) for name in names]
    rows = [
        [layer, *map(float, x)] for layer, x in enumerate(zip(*columns, strict=True))
    ]
    head = ("layer", "recall", "at budget", "mass", "own query", "oracle")
    head = (*head, "lost", "to the oracle", "overlap")
    return ["", "## By layer, mean of the texts", "", *_table(head, rows)]


def _positions(report: Mapping[str, Any]) -> list[str]:
    first = next(iter(report["domains"].values()))
    rows = [
        [name, *map(float, np.mean(np.asarray(x["positions"]["recall"], float), 0))]
        for name, x in report["domains"].items()
    ]
    head = ("text", *_buckets(first["positions"]["edges"]))
    masses = {
        label: mean_over_domains(report, "positions", name).mean(0)
        for name, label in _NAMES.items()
    }
    ours = masses["Forecast"]
    masses["lost"] = masses["own query"] - ours
    masses["lost to the oracle"] = masses["oracle"] - ours
    mass = [[name, *map(float, values)] for name, values in masses.items()]
    return [
        *("", "## Recall by position, mean of the layers", "", *_table(head, rows)),
        *("", "## Mass by position, mean of layers and texts", ""),
        *_table(("lists of", *head[1:]), mass),
    ]


def _lost_by_head(report: Mapping[str, Any]) -> np.ndarray:
    """Mass that the own query's lists have and the forecast's do not [layers, N]."""
    own, ours = (
        mean_over_domains(report, "heads", name) for name in ("own_mass", _OURS)
    )
    return own - ours


def _heads(report: Mapping[str, Any]) -> list[str]:
    """The heads of least recall, and those that lose most mass."""
    recall = mean_over_domains(report, "heads", "recall")
    lost = _lost_by_head(report)
    oracle = mean_over_domains(report, "heads", "oracle_mass")
    ours = mean_over_domains(report, "heads", _OURS)

    def first(values: np.ndarray) -> list[tuple[int, int]]:
        order = np.argsort(values, axis=None, kind="stable")[:_WORST_HEADS]
        return [divmod(int(place), values.shape[1]) for place in order]

    worst = [[layer, head, float(recall[layer, head])] for layer, head in first(recall)]
    losing = [
        [layer, head, *(float(x[layer, head]) for x in (ours, lost, oracle - ours))]
        for layer, head in first(-lost)
    ]
    columns = ("layer", "query head", "mass", "lost", "to the oracle")
    return [
        *("", f"## By head: the {len(worst)} kv heads of least recall", ""),
        *_table(("layer", "kv head", "recall"), worst),
        *("", f"## By head: the {len(losing)} query heads that lose most mass", ""),
        *_table(columns, losing),
    ]


def _apart(report: Mapping[str, Any]) -> list[str]:
    """The worst layers: what is missed at which distance, and how much is there."""
    first = next(iter(report["domains"].values()))["distances"]
    missed, wanted = (
        mean_over_domains(report, "distances", name).mean(1)
        for name in ("missed", "wanted")
    )
    worst = worst_layers(report)
    rows = [
        [
            f"layer {layer}",
            *(
                "–" if not np.isfinite(x) else f"{100 * x:.0f} % of {100 * y:.0f} %"
                for x, y in zip(missed[layer], wanted[layer], strict=True)
            ),
        ]
        for layer in worst
    ]
    return [
        *("", "## The worst layers by distance", ""),
        "Of the blocks that own queries choose so many blocks back (the second share: "
        "of all that they choose), the share that the Forecast misses.",
        "",
        *_table(("", *_buckets(first["edges"])), rows),
    ]


def _budgets(report: Mapping[str, Any]) -> list[str]:
    first = next(iter(report["domains"].values()))
    curves = {
        label: mean_over_domains(report, "budgets", name).mean(0)
        for name, label in (("recall", "recall"), *_NAMES.items())
    }
    rows = [
        [blocks, *(float(curve[i]) for curve in curves.values())]
        for i, blocks in enumerate(first["budgets"]["blocks"])
    ]
    return ["", "## Recall and mass by budget", "", *_table(("blocks", *curves), rows)]


def _layer_budgets(report: Mapping[str, Any]) -> list[str]:
    held = report.get("layer_budgets")
    if held is None:
        return []
    return [
        "",
        "## Budget by layer",
        "",
        f"{', '.join(map(str, held['block_budget']))}: {held['blocks_read']:.1f} "
        f"blocks on average capture {held['mass']:.4f} of the attention mass; "
        f"{held['flat']} in every layer capture {held['flat_mass']:.4f}.",
    ]


def _misses(report: Mapping[str, Any]) -> list[str]:
    first = next(iter(report["domains"].values()))["misses"]
    ahead, own = (
        mean_over_domains(report, "misses", name).mean(0)
        for name in ("forecast", "own")
    )
    moved = mean_over_domains(report, "misses", "bytes_per_step", "forecast")
    rows = [
        [slots, float(ahead[i]), float(own[i]), f"{moved[i] / 2**20:.2f}"]
        for i, slots in enumerate(first["slots"])
    ]
    head = ("slots C", "missed share of a list", "by own query", "MiB a step and row")
    return ["", "## Misses of an LRU cache", "", *_table(head, rows)]


def markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as a page; `pictures` are file names beside it."""
    sparse = report["sparse"]
    lines = [
        f"# Forecast report: {report['model']}",
        "",
        f"Heads: {report.get('heads', 'the model’s own')}. Blocks of "
        f"{sparse['block_size']}, budget {sparse['block_budget']} "
        f"({sparse['init_blocks']} init, {sparse['local_blocks']} + 1 local), windows "
        f"{sparse['kernel_size']}/{sparse['kernel_stride']}; {report['dtype']}, "
        f"{report['device']}, JAX {report['jax']}.",
        "",
        *_domains(report),
        "",
        _HOW,
        *_verdict(report),
        *_positions(report),
        *_budgets(report),
        *_layer_budgets(report),
        *_misses(report),
        *_layers(report),
        *_heads(report),
        *_apart(report),
        "",
        "Worst layers: " + ", ".join(map(str, worst_layers(report))) + ".",
    ]
    lines += [line for name in pictures for line in ("", f"![{name}]({name})")]
    return "\n".join(lines) + "\n"


def _by_layer(report: Mapping[str, Any]) -> dict[str, list[plots.Point]]:
    return {
        name: [plots.Point(i, y) for i, y in enumerate(x["layers"]["recall"])]
        for name, x in report["domains"].items()
    }


def _curves(
    report: Mapping[str, Any], group: str, names: Mapping[str, str], at: Sequence[Any]
) -> dict[str, list[plots.Point]]:
    found = {}
    for name, label in names.items():
        values = mean_over_domains(report, group, name)
        values = values.mean(0) if values.ndim == 2 else values
        found[label] = [
            plots.Point(x, float(y)) for x, y in zip(at, values, strict=True)
        ]
    return found


def draw(report: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes the plots; returns their names.

    Raises:
      ConfigError: matplotlib is not installed.
      CheckpointError: The place cannot be written to.
    """
    first = next(iter(report["domains"].values()))
    layers = len(first["layers"]["recall"])
    positions = mean_over_domains(report, "positions", "recall")
    missed = mean_over_domains(report, "distances", "missed")
    worst = worst_layers(report)
    heads, lost = missed.shape[1], _lost_by_head(report)
    tables: dict[str, tuple[np.ndarray, dict[str, Any], tuple[float, float]]] = {
        "recall-by-position.png": (
            100 * positions,
            {
                "rows": [f"layer {i}" for i in range(layers)],
                "columns": _buckets(first["positions"]["edges"]),
                "title": "Recall of the chosen blocks by layer and position, %",
            },
            (8.0, 2.0 + 0.3 * layers),
        ),
        "worst-layers.png": (
            100 * missed[worst].reshape(-1, missed.shape[2]),
            {
                "rows": [
                    f"layer {i}, kv head {k}" for i in worst for k in range(heads)
                ],
                "columns": _buckets(first["distances"]["edges"]),
                "title": "The worst layers: missed share by distance in blocks, %",
            },
            (9.0, 2.5 + 0.35 * heads * len(worst)),
        ),
        "lost-by-head.png": (
            100 * lost,
            {
                "rows": [f"layer {i}" for i in range(layers)],
                "columns": [f"head {i}" for i in range(lost.shape[1])],
                "title": "Attention mass lost against own queries, by query head, %",
                "form": ".1f",
            },
            (3.0 + 0.5 * lost.shape[1], 2.0 + 0.3 * layers),
        ),
    }
    charts = {
        "recall-by-layer.png": (
            _by_layer(report),
            {"xlabel": "layer", "ylabel": "recall of the chosen blocks"},
        ),
        "mass-by-layer.png": (
            _curves(report, "layers", _NAMES, range(layers)),
            {"xlabel": "layer", "ylabel": "attention mass in the lists"},
        ),
        "mass-by-budget.png": (
            _curves(report, "budgets", _NAMES, first["budgets"]["blocks"]),
            {"xlabel": "blocks of a list", "ylabel": "attention mass in the lists"},
        ),
        "misses.png": (
            _curves(
                report,
                "misses",
                {"forecast": "Forecast", "own": "own query"},
                first["misses"]["slots"],
            ),
            {"xlabel": "slots of a kv head", "ylabel": "missed share of a list"},
        ),
    }
    for name, (series, labels) in charts.items():
        plots.save(
            folder / name,
            lambda figure, s=series, k=labels: plots.lines(figure, s, **k),
        )
    for name, (values, labels, size) in tables.items():
        plots.save(
            folder / name,
            lambda figure, v=values, k=labels: plots.heat_map(figure, v, **k),
            size=size,
        )
    return [*charts, *tables]


def write_pages(report: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes `report.md` and, with matplotlib, the plots; returns the files' names.

    Raises:
      CheckpointError: The place cannot be written to.
    """
    pictures = draw(report, folder) if plots.available() else []
    write_text(folder / "report.md", markdown(report, pictures))
    return ["report.md", *pictures]
