"""Reports of an evaluation's directory: Markdown, plots, and a page that needs nothing.

Everything is made from the files of the directory alone: no model is loaded.
"""

import base64
import dataclasses
import functools
import html
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparda_jax.checkpoint.atomic import write_json, write_text
from sparda_jax.checks import ConfigError, path, shown
from sparda_jax.evaluation import plots
from sparda_jax.evaluation.answers import Record
from sparda_jax.evaluation.plots import Point
from sparda_jax.evaluation.run_files import Cell, RunFiles
from sparda_jax.evaluation.statistics import paired_difference
from sparda_jax.evaluation.sweep_tables import (
    OWN_QUERIES,
    against_table,
    nearness_table,
    solved_means,
    solved_series,
    task_sweep_tables,
)
from sparda_jax.evaluation.tables import (
    Scores,
    Table,
    Variant,
    agreement_table,
    answer_table,
    counts_table,
    depth_series,
    failures,
    perplexity_table,
    score_table,
    sweep_series,
    sweep_table,
)

_TABLES = (score_table, sweep_table, answer_table, perplexity_table, agreement_table)
_WRONG = 3  # Wrong answers that the page shows of a cell.
_SHOWN = (
    ("model", "model"),
    ("weights", "weights"),
    ("forecast", "Forecast heads"),
    ("tokenizer", "tokenizer"),
    ("prompts", "prompts"),
    ("dtype", "type"),
    ("cache", "cache"),
    ("geometry", "selection"),
    ("samples", "samples a task"),
    ("seed", "seed"),
    ("floor", "floor"),
    ("devices", "device"),
    ("jax", "JAX"),
    ("python", "Python"),
    ("commits", "commit"),
    ("started", "date"),
)
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; background: Canvas; color: CanvasText; }
table { border-collapse: collapse; margin: .5rem 0;
        font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
         white-space: nowrap; }
th { background: var(--head); }
td.long { white-space: pre-wrap; min-width: 20rem; }
img { max-width: 100%; height: auto; }
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """The tables of an evaluation.

    Attributes:
      folder: Its directory.
      settings: What `run.json` says.
      cells: Records by cell.
      tables: All tables, in order.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]
    cells: Mapping[Cell, list[Record]]
    tables: tuple[Table, ...]

    @property
    def scores(self) -> Scores:
        """What tables are made from."""
        return Scores(self.cells, self.settings)

    def markdown(self, images: Sequence[str] = ()) -> str:
        """The whole report as Markdown.

        Args:
          images: Names of plots in the same directory.
        """
        lines = [f"# Evaluation of {self.settings.get('model', '')}", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts()]
        parts = ["\n".join(lines) + "\n", *(table.markdown() for table in self.tables)]
        for name in images:
            dark = plots.dark_path(name).name
            parts.append(
                f'<picture><source media="(prefers-color-scheme: dark)" '
                f'srcset="{dark}"><img alt="{name}" src="{name}"></picture>\n'
            )
        return "\n".join(parts)

    def facts(self) -> list[tuple[str, str]]:
        """What was run, as names and values."""
        found = []
        for key, name in _SHOWN:
            value = self.settings.get(key)
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value)) or "unknown"
            found.append((name, str(value)))
        return found

    def __str__(self) -> str:
        return self.markdown()


def read_report(folder: str | os.PathLike) -> Report:
    """Reads the results of `evaluate` and makes their tables.

    Args:
      folder: Its `out`.

    Raises:
      ConfigError: If it is no such directory, or holds no results yet.
      CheckpointError: If a file is damaged.
    """
    files = RunFiles(pathlib.Path(path("folder", folder)))
    settings, cells = files.settings, files.cells()
    if not cells:
        raise ConfigError(f"{files.folder} holds no results yet")
    scores = Scores(cells, settings)
    failed = failures(scores, cells)
    tables = [*tables_of(scores), counts_table(scores, cells)]
    tables += [failed] if failed else []
    return Report(files.folder, settings, cells, tuple(tables))


def tables_of(scores: Scores) -> list[Table]:
    """The tables of scores, length by length."""
    return [
        made
        for length in scores.lengths()
        for made in (
            *(make(scores, length) for make in _TABLES),
            *task_sweep_tables(scores, length),
            solved_means(scores, length),
            *(nearness_table(scores, length, ours) for ours in OWN_QUERIES),
            *(against_table(scores, length, ours) for ours in OWN_QUERIES),
        )
        if made is not None
    ]


type _Series = Mapping[str, Sequence[Point]]


def _plots(report: Report) -> dict[str, tuple[_Series, Mapping[str, str]]]:
    """Series and labels of each plot, by file name."""
    scores, model = report.scores, report.settings.get("model", "")
    found: dict[str, tuple[_Series, Mapping[str, str]]] = {}
    for length in scores.lengths():
        sweep, depth = sweep_series(scores, length), depth_series(scores, length)
        if len(sweep) < 2:  # cells are missing: the tasks that all have run
            sweep = solved_series(scores, length)
        if len(sweep) > 1:
            found[f"sweep-{length}.png"] = (
                sweep,
                {
                    "xlabel": "blocks that decode reads, %",
                    "ylabel": "mean score",
                    "title": f"{model}, {length:,} tokens",
                },
            )
        if len(depth) > 1:
            found[f"depth-{length}.png"] = (
                depth,
                {
                    "xlabel": "depth of the answer, % of the text",
                    "ylabel": "mean score",
                    "title": f"{model}, {length:,} tokens, smallest budget",
                },
            )
    return found


def write_report(report: Report) -> list[str]:
    """Writes report.md, report.html, summary.json and, with matplotlib, the plots.

    Returns:
      Names of the files.

    Raises:
      CheckpointError: If the directory cannot be written to.
    """
    folder = report.folder
    images: list[str] = []
    if plots.available():
        for name, (series, labels) in _plots(report).items():
            draw: Callable = functools.partial(plots.lines, series=series, **labels)
            plots.save(folder / name, draw, size=(9.0, 5.5))
            images.append(name)
    write_text(folder / "report.md", report.markdown(images))
    write_text(folder / "report.html", _page(report, images))
    write_json(folder / "summary.json", _summary(report))
    return ["report.md", "report.html", "summary.json", *images]


def _summary(report: Report) -> dict[str, Any]:
    """Means and intervals for programs."""
    scores = report.scores
    rows = []
    for length in scores.lengths():
        for variant in scores.variants(length):
            mean = scores.mean(length, variant)
            rows.append(
                {
                    "length": length,
                    "attention": variant.attention,
                    "budget": variant.budget,
                    "mean": None if mean is None else mean._asdict(),
                    "read": scores.read_share(length, variant),
                }
            )
    return {
        "settings": dict(report.settings),
        "means": rows,
        "tables": [dataclasses.asdict(table) for table in report.tables],
    }


def _cells(row: Sequence[str], tag: str) -> str:
    parts = (
        f"<{tag}{' class=long' if len(text) > 60 else ''}>{html.escape(text)}</{tag}>"
        for text in row
    )
    return f"<tr>{''.join(parts)}</tr>"


def _html_table(table: Table) -> str:
    rows = "".join(_cells(row, "td") for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2><div class=wide><table>"
        f"<thead>{_cells(table.head, 'th')}</thead><tbody>{rows}</tbody></table></div>"
        f"{note}"
    )


def _picture(folder: pathlib.Path, name: str) -> str:
    """A plot inside the page, in both its forms."""
    light, dark = (
        base64.b64encode(file.read_bytes()).decode()
        for file in (folder / name, plots.dark_path(folder / name))
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{light}"></picture>'
    )


def _wrong_answers(report: Report) -> str:
    """Some wrong answers of every cell, with what was wanted."""
    rows = []
    for cell, records in sorted(report.cells.items()):
        wrong = [r for r in records if r.get("score", 100.0) < 100 and "output" in r]
        for record in wrong[:_WRONG]:
            rows.append(
                (
                    f"{cell.task} {cell.length}",
                    report.scores.label(Variant(cell.attention, cell.budget)),
                    str(record["index"]),
                    f"{record['score']:.0f}",
                    str(record.get("outputs", ""))[:300],
                    str(record["output"])[:300],
                )
            )
    if not rows:
        return ""
    head = ("task", "attention", "sample", "score", "wanted", "answer")
    note = "All samples stand in results/*.jsonl."
    table = _html_table(Table("Wrong answers", head, tuple(rows), note))
    return f"<details><summary>Wrong answers ({len(rows)})</summary>{table}</details>"


def _page(report: Report, images: Sequence[str]) -> str:
    """One HTML file that loads nothing."""
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in report.facts()
    )
    title = html.escape(f"Evaluation of {report.settings.get('model', '')}")
    pictures = "".join(_picture(report.folder, name) for name in images)
    tables = "".join(map(_html_table, report.tables))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<table>{facts}</table>{pictures}{tables}{_wrong_answers(report)}"
        "</body></html>\n"
    )


def compare(first: str | os.PathLike, second: str | os.PathLike) -> Table:
    """Differences between two evaluations, cell by cell.

    Samples are compared in pairs where both had the same prompts: the interval is then
    that of the difference.

    Raises:
      ConfigError: If they have no cell in common.
      CheckpointError: If a file is damaged.
    """
    one, other = read_report(first), read_report(second)
    rows = []
    for cell in sorted(set(one.cells) & set(other.cells)):
        before, after = one.cells[cell], other.cells[cell]
        field = "score" if all("score" in r for r in [*before, *after]) else "surprise"
        if any(field not in record for record in [*before, *after]):
            continue
        same = [r.get("prompt") for r in before] == [r.get("prompt") for r in after]
        left, right = ([r[field] for r in records] for records in (before, after))
        told = "prompts differ"
        if same:
            told = paired_difference([left], [right]).text("+.2f")
        rows.append(
            (
                f"{cell.task}, {cell.length:,}",
                one.scores.label(Variant(cell.attention, cell.budget)),
                "log perplexity" if field == "surprise" else field,
                f"{sum(left) / len(left):.2f}",
                f"{sum(right) / len(right):.2f}",
                told,
            )
        )
    if not rows:
        raise ConfigError(
            f"{shown(str(first))} and {shown(str(second))} have no task, length, "
            "attention and budget in common"
        )
    head = ("task", "attention", "figure", "A", "B", "B − A [95 %]")
    return Table(f"B = {second} against A = {first}", head, tuple(rows))
