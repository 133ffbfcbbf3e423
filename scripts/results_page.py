"""Keeps the results of evaluations in docs/results/, and makes the tables of the pages.

    python scripts/results_page.py take docs/results/NAME.json OUT [OUT …]
    python scripts/results_page.py add docs/results/NAME.json OUT [OUT …]
    python scripts/results_page.py begin docs/results/NAME.json OUT
    python scripts/results_page.py write
    python scripts/results_page.py check

`take` reads directories of `sparda eval` (parts of one evaluation, run apart) and keeps
what tables need: settings, and of every sample its score, its tokens and the blocks
read; `add` puts further directories to what the file has. `begin` makes a directory of
what the file has, so that `sparda eval --out OUT` runs what it lacks and nothing else.
`write` fills the parts of docs/results.md and docs/results/*.md: between `<!-- results:
NAME LENGTH -->` and `<!-- end of NAME LENGTH -->` with the tables that `sparda report`
makes of that length, whose plots it draws; between `<!-- overview -->` and `<!-- end of
overview -->` with the means of all. `check` says whether they hold what the files say.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparda_jax.checkpoint.atomic import write_text
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import MAX_JSON, parse_json, read_text
from sparda_jax.checks import ConfigError
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser
from sparda_jax.evaluation import plots
from sparda_jax.evaluation.answers import DENSE, Record
from sparda_jax.evaluation.report import Report, read_report, tables_of
from sparda_jax.evaluation.run_checks import check_records, check_settings
from sparda_jax.evaluation.run_files import Cell, RunFiles
from sparda_jax.evaluation.statistics import estimate, mean_of_tasks
from sparda_jax.evaluation.sweep_tables import always_run, solved_series
from sparda_jax.evaluation.tables import MISSING, Scores, Table, Variant, sweep_series
from sparda_jax.sparse.selectors import selector_names

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
DATA = ROOT / "docs" / "results"
_PART = re.compile(r"<!-- results: (\S+) (\d+) -->\n.*?<!-- end of \1 \2 -->", re.S)
_OVERVIEW = re.compile(r"(<!-- overview -->\n).*?(<!-- end of overview -->)", re.S)
# Lists of settings that parts of one evaluation may have more or less of.
_JOINED = ("attention", "tasks", "lengths", "devices", "commits")
# What these say stands in the sweeps of single tasks, where there are several budgets.
_SWEPT, _LEFT_OUT = "Scores at", "Budget sweep"
# What is kept of every sample, beside its prompt's hash.
_COLUMNS = ("score", "tokens", "read")
_NAMES = tuple(field.name for field in dataclasses.fields(Cell))
_FEWEST = 3  # Ways to attend that are worth a plot.
_MEAN = "mean"
_QWEN = ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-second")
_SMOL = ("smollm2-135m",)
_NEEDLES = ("niah_single_1", "ruler_style_single_2", "ruler_style_single_3")
# Columns of the overview: in their heads, files, length, tasks that all must have run.
_SIDE_BY_SIDE = (
    ("Qwen 16k", _QWEN, 16384, ("passkey", *_NEEDLES, "ruler_style_multivalue")),
    ("Qwen 30k", _QWEN, 30720, _NEEDLES),
    ("SmolLM2 2k", _SMOL, 2048, ("passkey",)),
    ("SmolLM2 4k", _SMOL, 4096, ("passkey",)),
)
_MARKS = ("", "²")  # Of which file a figure is.
_FACTS = (
    "model",
    "weights",
    "Forecast heads",
    "type",
    "selection",
    "samples a task",
    "seed",
    "device",
    "JAX",
    "commit",
    "date",
)


def _check_parts(settings: Mapping[str, Any], report: Report, other: object) -> None:
    """Checks that a report is of the evaluation that these settings are of.

    Raises:
      ConfigError: If it is not.
    """
    one, known = _of_all(report.settings), _of_all(settings)
    for name in ("weights", "forecast", "geometry", "samples", "seed", "dtype"):
        if one.get(name) != known.get(name):
            raise ConfigError(
                f"{report.folder} has {name}={one.get(name)!r}, and "
                f"{other} {known.get(name)!r}: they are no parts of one evaluation"
            )


def _of_all(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without budgets by layer: those are one selector's, under its name."""
    geometry = dict(settings.get("geometry", {}))
    geometry.pop("layer_budgets", None)
    return {**settings, "geometry": geometry}


def _joined(settings: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Settings of an evaluation with a further part."""
    joined = dict(settings)
    for name in _JOINED:
        known = settings.get(name, [])
        more = [x for x in report.settings.get(name, []) if x not in known]
        joined[name] = [*known, *more]
    joined["labels"] = report.settings["labels"] | settings["labels"]
    for name in ("jax", "python"):
        known = f"{settings.get(name, '')}, {report.settings.get(name, '')}"
        joined[name] = ", ".join(dict.fromkeys(known.split(", ")))
    return joined


def _kept(cell: Cell, records: Sequence[Record]) -> dict[str, Any]:
    """What tables need of a cell."""
    failed = [record["index"] for record in records if "failed" in record]
    if failed:
        raise ConfigError(f"{cell.name}: samples {failed} failed: run them again")
    return {
        "task": cell.task,
        "length": cell.length,
        "attention": cell.attention,
        "budget": cell.budget,
        "prompts": [record["prompt"] for record in records],
        **{name: [record[name] for record in records] for name in _COLUMNS},
    }


def take(file: pathlib.Path, folders: Sequence[str], *, add: bool = False) -> None:
    """Keeps what directories of `sparda eval` hold in one file.

    Args:
      file: Where.
      folders: The directories; of two that have a cell the later one counts.
      add: Keep what the file has besides, its words first.
    """
    reports = [read_report(folder) for folder in folders]
    held, kept = _held(file) if add else (reports[0].settings, {})
    settings = _of_all(held)
    for report in reports:
        _check_parts(settings, report, file if add else reports[0].folder)
        settings = _joined(settings, report)
        kept |= {cell: _kept(cell, records) for cell, records in report.cells.items()}
    cells = _without_copies([kept[cell] for cell in sorted(kept)])
    # A line a cell, so that a change of one is seen as such.
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    write_text(
        file, f'{{"settings": {json.dumps(settings)},\n"cells": [\n{lines}\n]}}\n'
    )


def begin(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes the directory of an evaluation that goes on from what a file has.

    Args:
      file: What `take` has kept.
      folder: A new `--out` of `sparda eval`: it runs the cells that are not there.
    """
    settings, cells = _held(file)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: name another directory")
    files = RunFiles(folder)
    files.begin(settings)
    for cell, kept in cells.items():
        files.write_result(cell, _records(kept))


def _held(file: pathlib.Path) -> tuple[dict[str, Any], dict[Cell, dict[str, Any]]]:
    """What `take` has kept: settings, and cells, each with its prompts again.

    Raises:
      ConfigError: If there is no such file.
      CheckpointError: If it is damaged; names the line.
    """
    text = read_text(file, MAX_JSON)
    if text is None:
        raise ConfigError(f"{file} is missing: `take` makes it")
    held = parse_json(text, str(file))
    if not isinstance(held, dict) or not isinstance(held.get("cells"), list):
        raise CheckpointError(f"{file}: is damaged: wanted what `take` writes")
    settings, cells = held.get("settings"), held["cells"]
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: line 1: has no 'settings'")
    check_settings(settings, f"{file}: line 1")
    # Two lines stand before the cells, and one behind, unless it was edited since.
    first = 3 if text.count("\n") == len(cells) + 3 else None
    prompts: dict[tuple[str, int], list[str]] = {}
    found = {}
    for n, cell in enumerate(cells):
        where = f"{file}: {f'cell {n}' if first is None else f'line {first + n}'}"
        _check_cell(cell, where)
        task = cell["task"], cell["length"]
        told = cell["prompts"] or prompts.get(task)
        if told is None or len(told) != len(cell["score"]):
            raise CheckpointError(
                f"{where}: has not the prompts of its {len(cell['score'])} samples"
            )
        prompts.setdefault(task, told)
        kept = {**cell, "prompts": told}
        check_records([(where, record) for record in _records(kept)])
        found[Cell(*(cell[name] for name in _NAMES))] = kept
    return settings, found


def _check_cell(cell: Any, where: str) -> None:
    """Checks that a cell has all its fields, and as many of each sample's as another.

    Raises:
      CheckpointError: If not.
    """
    if not isinstance(cell, dict):
        raise CheckpointError(f"{where}: is no object")
    for name in (*_NAMES, "prompts", *_COLUMNS):
        if name not in cell:
            raise CheckpointError(f"{where}: has no {name!r}")
    for name in ("prompts", *_COLUMNS):
        if not isinstance(cell[name], list):
            raise CheckpointError(f"{where}: {name!r} must be a list")
    counts = {name: len(cell[name]) for name in _COLUMNS}
    if len(set(counts.values())) > 1 or not cell["score"]:
        raise CheckpointError(f"{where}: must have all of each sample, has {counts}")
    # The rest of a record is checked where there are records.
    check_records([(where, {n: cell[n] for n in _NAMES} | {"index": 0, "score": 0})])


def _records(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a cell with its prompts."""
    names = {"prompts": "prompt"} | {name: name for name in _COLUMNS}
    head = {name: kept[name] for name in _NAMES}
    rows = zip(*(kept[name] for name in names), strict=True)
    return [
        {**head, "index": n, **dict(zip(names.values(), row, strict=True))}
        for n, row in enumerate(rows)
    ]


def _without_copies(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, with prompts told by the first cell of a task alone."""
    first: dict[tuple[str, int], list[str]] = {}
    for cell in cells:
        key = cell["task"], cell["length"]
        if key not in first:
            first[key] = cell["prompts"]
            continue
        if cell["prompts"] != first[key]:
            raise ConfigError(f"{cell['task']}: prompts differ between selectors")
        cell["prompts"] = []
    return cells


def read(file: pathlib.Path) -> Scores:
    """What `take` has kept."""
    settings, cells = _held(file)
    return Scores({cell: _records(kept) for cell, kept in cells.items()}, settings)


def _of_length(scores: Scores, length: int) -> Scores:
    """The scores of one length."""
    cells = {c: records for c, records in scores.cells.items() if c.length == length}
    return Scores(cells, scores.settings)


def overview() -> str:
    """The table of all ways to attend that have a name: a column a budget."""
    columns: dict[str, dict[str, str]] = {}
    labels: dict[str, str] = {}
    names = {name for _, files, *_ in _SIDE_BY_SIDE for name in files}
    every = {name: read(DATA / f"{name}.json") for name in names}
    for title, files, length, tasks in _SIDE_BY_SIDE:
        sets = [_of_length(every[name], length) for name in files]
        cells = [
            c for one in sets for c in one.cells if c.attention in selector_names()
        ]
        blocks = length / sets[0].settings["geometry"]["block_size"]
        for budget in sorted({c.budget for c in cells if c.budget}, reverse=True):
            share = f"{100 * budget / blocks:.1f}".removesuffix(".0")
            column = columns.setdefault(f"{title}: {share} %", {})
            for name in {c.attention for c in cells}:
                column[name] = _means(sets, length, name, budget, tasks)
        labels |= {c.attention: sets[0].label(Variant(c.attention, 0)) for c in cells}
    (first, *_) = columns.values()

    def place(name: str) -> tuple[bool, bool, float, str]:
        text = first.get(name, MISSING)
        value = 0.0 if text == MISSING else float(re.split("[,²]", text)[0])
        return name != DENSE, name != "oracle", -value, name

    rows = [
        (
            f"`{name}`" if labels[name] == name else f"{labels[name]} (`{name}`)",
            *(column.get(name, MISSING) for column in columns.values()),
        )
        for name in sorted(labels, key=place)
    ]
    # Its heading is the page's own.
    text = Table("", ("attention", *columns), tuple(rows)).markdown()
    return text.removeprefix("### \n\n")


def _means(
    sets: Sequence[Scores], length: int, name: str, budget: int, tasks: Sequence[str]
) -> str:
    """A way to attend's means over tasks, one a set that has all of them."""
    found: dict[str, str] = {}
    for mark, scores in zip(_MARKS, sets, strict=False):
        without = Cell(tasks[0], length, name, 0) in scores.cells
        variant = Variant(name, 0 if without else budget)
        values = [scores.values(task, length, variant, "score") for task in tasks]
        if all(values):
            mean = sum(sum(v) / len(v) for v in values) / len(values)
            found.setdefault(f"{mean:.1f}", mark)
    return ", ".join(f"{mean}{mark}" for mean, mark in found.items()) or MISSING


def part(name: str, length: int) -> str:
    """The tables of one file and length, as they stand in a page."""
    every = _of_length(read(DATA / f"{name}.json"), length)
    scores, alone = _with_others(every)
    without = (_SWEPT, _LEFT_OUT) if _swept(scores, length) else (_LEFT_OUT,)
    tables = [t for t in tables_of(scores) if not t.title.startswith(without)]
    tables += [t] if (t := _without_dense(scores, length)) else []
    report = Report(DATA, scores.settings, {}, tuple(tables))
    facts = [f"* {key}: {value}" for key, value in report.facts() if key in _FACTS]
    if alone:
        facts.append(f"* dense alone was run on: {', '.join(alone)}")
    parts = ["\n".join(facts) + "\n"]
    for table in tables:
        parts.append(table.markdown())
        for task in _drawn(scores, length):
            if table.title.startswith(_titles(task, length)):
                file = _picture(name, task, length)
                parts.append(f"![{task}, {length:,} tokens]({file.name})\n")
    return "\n".join(parts)


def _without_dense(scores: Scores, length: int) -> Table | None:
    """Scores of the tasks that dense was not run on: it says nothing of a floor."""
    tasks = [t for t in scores.scored(length) if scores.dense_score(t, length) is None]
    rows = []
    for way in scores.variants(length):
        every = [scores.values(task, length, way, "score") for task in tasks]
        if any(every):
            texts = (estimate(v).text(".0f") if v else MISSING for v in every)
            mean = mean_of_tasks(every).text() if all(every) else MISSING
            rows.append((scores.label(way), *texts, mean))
    title = f"Without dense, at {length:,} tokens"
    note = "Intervals are 95 %, by bootstrap; a dash: not run."
    return (
        Table(title, ("attention", *tasks, _MEAN), tuple(rows), note) if rows else None
    )


def _titles(task: str, length: int) -> str:
    """How the title of a plot's table begins."""
    if task == _MEAN:
        return f"Tasks that dense solves, at {length:,} tokens"
    return f"{task} at {length:,} tokens"


def _drawn(scores: Scores, length: int) -> list[str]:
    """What there are plots of: sweeps of tasks, and of their means."""
    swept = _swept(scores, length)
    # The means of a single task are its own sweep.
    return [*swept, _MEAN] if swept and len(always_run(scores, length)) > 1 else swept


def _with_others(scores: Scores) -> tuple[Scores, list[str]]:
    """Scores of tasks that selectors were run on; and dense's on all others."""
    cells = scores.cells
    known = {(c.task, c.length) for c in cells if c.attention != DENSE}
    kept = {c: records for c, records in cells.items() if (c.task, c.length) in known}
    alone = [
        f"{task} at {length:,} tokens ({scores.dense_score(task, length):.0f})"
        for length in scores.lengths()
        for task in scores.scored(length)
        if (task, length) not in known
    ]
    return Scores(kept, scores.settings), alone


def _swept(scores: Scores, length: int) -> list[str]:
    """Tasks with a budget sweep that is worth a plot."""
    found = []
    for task in scores.scored(length):
        cells = [c for c in scores.cells if (c.task, c.length) == (task, length)]
        if scores.dense_score(task, length) is None:
            continue
        budgets = {cell.budget for cell in cells if cell.budget}
        if len(budgets) > 1 and len({c.attention for c in cells}) >= _FEWEST:
            found.append(task)
    return found


def _picture(name: str, task: str, length: int) -> pathlib.Path:
    return DATA / f"{name}-{task}-{length}.png"


def draw(name: str, length: int) -> None:
    """Draws the sweeps of a file; variants of a way to attend stand in tables alone."""
    every, _ = _with_others(_of_length(read(DATA / f"{name}.json"), length))
    labels = every.settings["labels"]
    plain = {
        cell: records
        for cell, records in every.cells.items()
        if "," not in labels.get(cell.attention, "")
    }
    scores = Scores(plain, every.settings)
    for task in _drawn(scores, length):
        cells = {c: r for c, r in scores.cells.items() if c.task == task}
        series, what = solved_series(scores, length), task
        if task == _MEAN:
            what = f"mean of {' and '.join(always_run(scores, length))}"
        else:
            series = sweep_series(Scores(cells, scores.settings), length)
        what = textwrap.fill(what, 80)
        lines: Callable = functools.partial(
            plots.lines,
            series=series,
            xlabel="blocks that decode reads, %",
            ylabel="score",
            title=f"{what}\n{length:,} tokens, {scores.settings['model']}",
            log_x=True,
        )
        picture = plots.png(lines, size=(8.0, 5.0))
        _picture(name, task, length).write_bytes(picture)


def filled(page: str) -> str:
    """A page with all its parts made anew."""

    def fill(mark: re.Match) -> str:
        name, length = mark.groups()
        made = part(name, int(length))
        return (
            f"<!-- results: {name} {length} -->\n{made}<!-- end of {name} {length} -->"
        )

    page = _OVERVIEW.sub(lambda marks: f"{marks[1]}{overview()}{marks[2]}", page)
    return _PART.sub(fill, page)


def _check_files(what: str, files: Sequence[str]) -> None:
    """Checks how many files are named.

    Raises:
      ConfigError: If it is none of what they are for.
    """
    wanted, fits = {
        "take": ("a file and directories", len(files) > 1),
        "add": ("a file and directories", len(files) > 1),
        "begin": ("a file and a directory", len(files) == 2),
    }.get(what, ("no files", not files))
    if not fits:
        raise ConfigError(f"{what} is of {wanted}, not of {len(files)} names")


def _run(arguments: argparse.Namespace) -> None:
    _check_files(arguments.what, arguments.files)
    if arguments.what in ("take", "add"):
        file, *folders = arguments.files
        take(pathlib.Path(file), folders, add=arguments.what == "add")
        return
    if arguments.what == "begin":
        file, folder = arguments.files
        begin(pathlib.Path(file), pathlib.Path(folder))
        return
    for file in (PAGE, *sorted(DATA.glob("*.md"))):
        page = file.read_text(encoding="utf-8")
        if arguments.what == "write":
            for name, length in _PART.findall(page):
                draw(name, int(length))
            write_text(file, filled(page))
        elif filled(page) != page:
            raise ConfigError(f"{file} is not what its files say: run `write`")


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=("take", "add", "begin", "write", "check"))
    parser.add_argument(
        "files", nargs="*", help="of take, add and begin: the file, then directories"
    )
    return run_command(lambda: _run(parser.parse_args(words)))


if __name__ == "__main__":
    raise SystemExit(main())
