"""Tables of an evaluation: from the records of its cells to rows of text.

All scores are 0 … 100. A task on which dense is under the floor is no measure of the
others: it is printed as 'not measured' and no mean holds it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparda_jax.evaluation.answers import DENSE, Record
from sparda_jax.evaluation.plots import Point
from sparda_jax.evaluation.run_files import Cell
from sparda_jax.evaluation.statistics import (
    Estimate,
    estimate,
    mean_of_tasks,
    paired_difference,
)

NOT_MEASURED = "not measured"
MISSING = "–"
_AGREEMENT = "agreement"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      title: Above it.
      head: Names of the columns.
      rows: Texts, as many as the head has.
      note: Below it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(map(_escaped, self.head)) + " |")
        lines.append("|" + "---|" * len(self.head))
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


class Variant(NamedTuple):
    """A row of a table: a selector with a budget; 0 where it has none, as dense."""

    attention: str
    budget: int


class Scores:
    """Records by cell, with what tables ask of them.

    Args:
      cells: Records by cell.
      settings: What `run.json` says.
    """

    def __init__(
        self, cells: Mapping[Cell, list[Record]], settings: Mapping[str, Any]
    ) -> None:
        self.cells = cells
        self.settings = settings
        order = list(settings.get("attention", []))
        self._order = {name: n for n, name in enumerate(order)}
        tasks = list(settings.get("tasks", []))
        self._task_order = {name: n for n, name in enumerate(tasks)}
        self.floor = float(settings.get("floor", 0))

    def label(self, variant: Variant) -> str:
        """What to call a row."""
        name = self.settings.get("labels", {}).get(variant.attention, variant.attention)
        return f"{name}, {variant.budget} blocks" if variant.budget else name

    def place(self, attention: str) -> int:
        """Where a selector stands in the order in which they were named."""
        return self._order.get(attention, len(self._order))

    def records(self, task: str, length: int, variant: Variant) -> list[Record] | None:
        """The records of a cell, None if it is not done."""
        return self.cells.get(Cell(task, length, *variant))

    def lengths(self) -> list[int]:
        """All lengths."""
        return sorted({cell.length for cell in self.cells})

    def variants(self, length: int) -> list[Variant]:
        """Selectors and budgets of a length: dense first, then as they were named."""
        # In the order of the cells where nobody named them: a set has none.
        found = [
            Variant(c.attention, c.budget) for c in self.cells if c.length == length
        ]
        return sorted(
            dict.fromkeys(found),
            key=lambda v: (v.budget > 0, v.budget, self.place(v.attention)),
        )

    def tasks(self, length: int, field: str) -> list[str]:
        """Tasks of a length whose records have a field, as they were named."""
        found = {
            cell.task
            for cell, records in self.cells.items()
            if cell.length == length and any(field in record for record in records)
        }
        return sorted(found, key=lambda t: (self._task_order.get(t, 99), t))

    def scored(self, length: int) -> list[str]:
        """Tasks with answers that are right or wrong."""
        return [
            t for t in self.tasks(length, "score") if not self._is_agreement(t, length)
        ]

    def _is_agreement(self, task: str, length: int) -> bool:
        return task in self.tasks(length, "kl")

    def dense_score(self, task: str, length: int) -> float | None:
        """Mean score of dense."""
        values = self.values(task, length, Variant(DENSE, 0), "score")
        return None if not values else estimate(values).mean

    def measured(self, task: str, length: int) -> bool:
        """Whether dense reaches the floor."""
        dense = self.dense_score(task, length)
        return dense is not None and dense >= self.floor

    def values(
        self, task: str, length: int, variant: Variant, field: str
    ) -> list[float]:
        """A figure of every record that has it, in the samples' order."""
        records = self.records(task, length, variant) or []
        found = [record.get(field) for record in records]
        return [float(value) for value in found if value is not None]

    def read_share(self, length: int, variant: Variant) -> float | None:
        """Share of the blocks that decode read, over the measured tasks."""
        shares = [
            share
            for task in self.scored(length)
            if self.measured(task, length)
            for share in self.values(task, length, variant, "read")
        ]
        return sum(shares) / len(shares) if shares else None

    def mean(self, length: int, variant: Variant) -> Estimate | None:
        """Mean over the measured tasks; None unless all of them are done."""
        values = self._measured_values(length, variant)
        return mean_of_tasks(values) if values else None

    def _measured_values(self, length: int, variant: Variant) -> list[list[float]]:
        tasks = [t for t in self.scored(length) if self.measured(t, length)]
        values = [self.values(task, length, variant, "score") for task in tasks]
        return values if all(values) else []

    def against_dense(self, length: int, variant: Variant) -> Estimate | None:
        """Difference to dense on the same samples, mean over the measured tasks."""
        own = self._measured_values(length, variant)
        dense = self._measured_values(length, Variant(DENSE, 0))
        if not own or [len(x) for x in own] != [len(x) for x in dense]:
            return None
        return paired_difference(dense, own)


def _text(value: Estimate | None) -> str:
    return MISSING if value is None else value.text()


def score_table(scores: Scores, length: int) -> Table | None:
    """Scores with intervals: a row a selector and budget, a column a task."""
    tasks = scores.scored(length)
    if not tasks:
        return None
    rows = []
    for variant in scores.variants(length):
        row = [scores.label(variant)]
        for task in tasks:
            values = scores.values(task, length, variant, "score")
            if not scores.measured(task, length):
                row.append(NOT_MEASURED)
            else:
                row.append(estimate(values).text() if values else MISSING)
        row += [
            _text(scores.mean(length, variant)),
            ""
            if variant.attention == DENSE
            else _text(scores.against_dense(length, variant)),
        ]
        rows.append(tuple(row))
    low = [task for task in tasks if not scores.measured(task, length)]
    dense = {task: scores.dense_score(task, length) for task in low}
    told = "; ".join(f"{t}: {s:.1f}" for t, s in dense.items() if s is not None)
    gone = ", ".join(task for task, score in dense.items() if score is None)
    note = "95 % bootstrap intervals. The mean is over the measured tasks."
    if told:
        note += f" Not measured, as dense scores less than {scores.floor:g}: {told}."
    if gone:
        note += f" Not measured, as there is no result of dense: {gone}."
    return Table(
        f"Scores at {length:,} tokens (0–100)",
        ("attention", *tasks, "mean", "mean − dense"),
        tuple(rows),
        note,
    )


def sweep_table(scores: Scores, length: int) -> Table | None:
    """Mean score by selector and budget, with the share of the blocks that is read."""
    variants = [v for v in scores.variants(length) if v.budget]
    budgets = sorted({variant.budget for variant in variants})
    if not variants or not any(scores.mean(length, v) for v in variants):
        return None
    names = list(dict.fromkeys(variant.attention for variant in variants))
    rows = []
    for name in names:
        row = [scores.label(Variant(name, 0))]
        for budget in budgets:
            variant = Variant(name, budget)
            mean = scores.mean(length, variant)
            share = scores.read_share(length, variant)
            read = "" if share is None else f" ({100 * share:.0f} % read)"
            row.append(f"{mean.text()}{read}" if mean else MISSING)
        rows.append(tuple(row))
    dense = scores.mean(length, Variant(DENSE, 0))
    return Table(
        f"Budget sweep at {length:,} tokens: mean over the measured tasks",
        ("attention", *(f"{budget} blocks" for budget in budgets)),
        tuple(rows),
        f"dense: {_text(dense)}.",
    )


def answer_table(scores: Scores, length: int) -> Table | None:
    """Tokens per answer: sparse decoding may make answers longer."""
    tasks = [t for t in scores.scored(length) if scores.measured(t, length)]
    if not tasks:
        return None
    rows = []
    for variant in scores.variants(length):
        row = [scores.label(variant)]
        for task in tasks:
            values = scores.values(task, length, variant, "tokens")
            row.append(f"{estimate(values).mean:.1f}" if values else MISSING)
        share = scores.read_share(length, variant)
        row.append(MISSING if share is None else f"{100 * share:.1f} %")
        rows.append(tuple(row))
    return Table(
        f"Tokens per answer at {length:,} tokens",
        ("attention", *tasks, "blocks read in decode"),
        tuple(rows),
    )


def perplexity_table(scores: Scores, length: int) -> Table | None:
    """Perplexity of texts, whole and by quarters of their positions."""
    tasks = scores.tasks(length, "surprise")
    if not tasks:
        return None
    rows = []
    for task in tasks:
        for variant in scores.variants(length):
            records = scores.records(task, length, variant)
            whole = scores.values(task, length, variant, "surprise")
            if not records or not whole:
                continue
            parts = [r["by_position"] for r in records if "by_position" in r]
            quarters = [
                sum(column) / len(column) for column in zip(*parts, strict=True)
            ]
            mean = estimate(whole)
            interval = f"{_exp(mean.mean):.3f} [{_exp(mean.low):.3f}, "
            rows.append(
                (
                    task,
                    scores.label(variant),
                    f"{interval}{_exp(mean.high):.3f}]",
                    *(f"{_exp(value):.3f}" for value in quarters),
                )
            )
    return Table(
        f"Perplexity at {length:,} tokens",
        ("text", "attention", "whole", "1st quarter", "2nd", "3rd", "4th"),
        tuple(rows),
        "Quarters of the positions; prefill attends. Selectors that prefill densely "
        "have dense's values.",
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # of a model that is broken
        return math.inf


def agreement_table(scores: Scores, length: int) -> Table | None:
    """How far decode is from dense on dense's own long answers."""
    tasks = scores.tasks(length, "kl")
    if not tasks:
        return None
    rows = []
    for variant in scores.variants(length):
        for task in tasks:
            same = scores.values(task, length, variant, "score")
            far = scores.values(task, length, variant, "kl")
            if same and far:
                kl = estimate(far).text(".4f")
                rows.append((scores.label(variant), estimate(same).text(), kl))
    return Table(
        f"Agreement with dense at {length:,} tokens",
        ("attention", "first choice alike, %", "KL(dense ‖ own), nats a token"),
        tuple(rows),
        "Dense's answer is fed token by token. The divergence is over dense's 64 "
        "likeliest tokens and all others as one.",
    )


def failures(scores: Scores, cells: Iterable[Cell]) -> Table | None:
    """Samples that did not run to their end: they count as 0."""
    rows = []
    for cell in sorted(cells):
        variant = Variant(cell.attention, cell.budget)
        for record in scores.records(cell.task, cell.length, variant) or []:
            if "failed" in record:
                where = f"{cell.task}, {cell.length:,} tokens, sample {record['index']}"
                rows.append((where, scores.label(variant), str(record["failed"])))
    if not rows:
        return None
    return Table("Failures", ("sample", "attention", "why"), tuple(rows))


def counts_table(scores: Scores, cells: Mapping[Cell, Sequence[Record]]) -> Table:
    """How many samples each task has, and how many of them failed."""
    by_task: dict[tuple[str, int], list[Sequence[Record]]] = {}
    for cell, records in sorted(cells.items()):
        by_task.setdefault((cell.task, cell.length), []).append(records)
    rows = []
    for (task, length), every in by_task.items():
        failed = sum("failed" in record for records in every for record in records)
        counts = sorted({len(records) for records in every})
        prompts = {tuple(r.get("prompt") for r in records) for records in every}
        rows.append(
            (
                task,
                f"{length:,}",
                " or ".join(map(str, counts)),
                str(len(every)),
                str(failed),
                "yes" if len(prompts) == 1 else "NO",
            )
        )
    return Table(
        "Samples",
        ("task", "tokens", "samples a cell", "cells", "failed", "same prompts for all"),
        tuple(rows),
    )


def sweep_series(scores: Scores, length: int) -> dict[str, list[Point]]:
    """Mean score against the share of the blocks that decode reads, by selector."""
    series: dict[str, list[Point]] = {}
    for variant in scores.variants(length):
        mean, share = scores.mean(length, variant), scores.read_share(length, variant)
        if mean is None or share is None:
            continue
        name = scores.label(Variant(variant.attention, 0))
        point = Point(100 * share, mean.mean, mean.low, mean.high)
        series.setdefault(name, []).append(point)
    return series


def depth_series(scores: Scores, length: int) -> dict[str, list[Point]]:
    """Mean score by depth of the answer, in quarters, for the smallest budget."""
    variants = scores.variants(length)
    budgets = [variant.budget for variant in variants if variant.budget]
    series: dict[str, list[Point]] = {}
    for variant in variants:
        if variant.budget not in (0, min(budgets, default=0)):
            continue
        quarters: list[list[float]] = [[], [], [], []]
        for task in scores.scored(length):
            if not scores.measured(task, length):
                continue
            for record in scores.records(task, length, variant) or []:
                if "depth" in record and "score" in record:
                    quarter = min(int(4 * record["depth"]), 3)
                    quarters[quarter].append(record["score"])
        points = [
            Point(12.5 + 25 * n, estimate(values).mean)
            for n, values in enumerate(quarters)
            if values
        ]
        if len(points) > 1:
            series[scores.label(variant)] = points
    return series
