"""Tables of a budget sweep: a column a budget, of single tasks and against SparDA."""

from collections.abc import Sequence

from sparda_jax.evaluation.answers import DENSE
from sparda_jax.evaluation.plots import Point
from sparda_jax.evaluation.statistics import (
    Estimate,
    estimate,
    mean_of_tasks,
    paired_difference,
)
from sparda_jax.evaluation.tables import MISSING, Scores, Table, Variant

_OURS = "sparda"
# The ways to use a Forecast, and who scores in the same way by own queries.
OWN_QUERIES = {_OURS: "infllm_v2", "sparda_bounds": "infllm_v2_bounds"}
# A task that dense solves, and what is as good as it.
SOLVED, WITHIN = 90.0, 2.0


def _names(scores: Scores, length: int) -> list[str]:
    """Selectors that have budgets, as they were named."""
    found = {v.attention: None for v in scores.variants(length) if v.budget}
    return sorted(found, key=scores.place)


def _budgets(scores: Scores, length: int) -> list[int]:
    return sorted({v.budget for v in scores.variants(length) if v.budget})


def _measured(scores: Scores, length: int) -> list[str]:
    return [t for t in scores.scored(length) if scores.measured(t, length)]


def task_sweep_tables(scores: Scores, length: int) -> list[Table]:
    """Of each measured task, the scores by selector and budget.

    Args:
      scores: All records.
      length: Tokens.

    Returns:
      A table a task; none where a single budget was run, which the table of scores
      shows as well.
    """
    budgets = _budgets(scores, length)
    if len(budgets) < 2:
        return []
    return [
        _task_sweep(scores, task, length, budgets) for task in _measured(scores, length)
    ]


def _task_sweep(
    scores: Scores, task: str, length: int, budgets: Sequence[int]
) -> Table:
    def text(variant: Variant) -> str:
        values = scores.values(task, length, variant, "score")
        return estimate(values).text(".0f") if values else MISSING

    without = [v for v in scores.variants(length) if not v.budget]
    rows = [(scores.label(v), *[text(v)] * len(budgets)) for v in without]
    for name in _names(scores, length):
        row = [text(Variant(name, budget)) for budget in budgets]
        rows.append((scores.label(Variant(name, 0)), *row))
    shares = [_read_share(scores, task, length, budget) for budget in budgets]
    pairs = zip(budgets, shares, strict=True)
    return Table(
        f"{task} at {length:,} tokens by budget",
        ("attention", *(f"{budget} blocks{share}" for budget, share in pairs)),
        tuple(row for row in rows if {*row[1:]} != {MISSING}),
        "95 % bootstrap intervals.",
    )


def _read_share(scores: Scores, task: str, length: int, budget: int) -> str:
    """The largest share of the blocks that a selector reads with a budget."""
    found = [
        sum(values) / len(values)
        for name in _names(scores, length)
        if (values := scores.values(task, length, Variant(name, budget), "read"))
    ]
    return f", {100 * max(found):.1f} % read" if found else ""


def against_table(scores: Scores, length: int, ours: str = _OURS) -> Table | None:
    """SparDA less each other way to attend, on the same samples and at equal budget.

    Args:
      scores: All records.
      length: Tokens.
      ours: Which way to use a Forecast.

    Returns:
      None without results of SparDA, or with nothing beside them.
    """
    budgets = _budgets(scores, length)
    others = [DENSE, *(n for n in _names(scores, length) if n != ours)]
    rows = []
    for name in others:
        row = [scores.label(Variant(name, 0))]
        for budget in budgets:
            row.append(_difference(scores, length, ours, name, budget))
        if any(text != MISSING for text in row[1:]):
            rows.append(tuple(row))
    if not rows:
        return None
    return Table(
        f"{ours} less the others at {length:,} tokens",
        ("attention", *(f"{budget} blocks" for budget in budgets)),
        tuple(rows),
        "Points, on the same samples, mean over the measured tasks that both have run; "
        "in parentheses how many these are. 95 % bootstrap intervals.",
    )


def _difference(scores: Scores, length: int, ours: str, name: str, budget: int) -> str:
    other = Variant(name, 0 if name == DENSE else budget)
    first: list[Sequence[float]] = []
    second: list[Sequence[float]] = []
    for task in _measured(scores, length):
        theirs = scores.values(task, length, other, "score")
        mine = scores.values(task, length, Variant(ours, budget), "score")
        if mine and len(mine) == len(theirs):
            first.append(theirs)
            second.append(mine)
    if not first:
        return MISSING
    return f"{paired_difference(first, second).text('+.1f')} ({len(first)})"


def _solved(scores: Scores, length: int) -> list[str]:
    """Tasks on which dense scores at least `SOLVED`."""
    return [
        task
        for task in _measured(scores, length)
        if (scores.dense_score(task, length) or 0.0) >= SOLVED
    ]


def _run_tasks(scores: Scores, length: int) -> dict[int, list[str]]:
    """Of them, those that SparDA has run, else any selector; by budget, none empty."""

    def run(names: Sequence[str], budget: int) -> list[str]:
        variants = [Variant(name, budget) for name in names]
        return [
            task
            for task in _solved(scores, length)
            if any(scores.records(task, length, variant) for variant in variants)
        ]

    found = {
        budget: run([_OURS], budget) or run(_names(scores, length), budget)
        for budget in _budgets(scores, length)
    }
    return {budget: tasks for budget, tasks in found.items() if tasks}


def _solved_mean(
    scores: Scores, length: int, name: str, budget: int, tasks: Sequence[str]
) -> tuple[Estimate, float] | None:
    """Mean and share of the blocks read; None unless all tasks were run."""
    variant = Variant(name, 0 if name == DENSE else budget)
    values, read = (
        [scores.values(task, length, variant, field) for task in tasks]
        for field in ("score", "read")
    )
    if not all(values) or not all(read):
        return None
    return mean_of_tasks(values), mean_of_tasks(read).mean


def solved_means(scores: Scores, length: int) -> Table | None:
    """Means over the tasks that dense solves, by selector and budget.

    Args:
      scores: All records.
      length: Tokens.

    Returns:
      None where dense solves none that a selector has run.
    """
    run = _run_tasks(scores, length)
    if not run:
        return None

    def text(name: str, budget: int, tasks: Sequence[str]) -> str:
        found = _solved_mean(scores, length, name, budget, tasks)
        return MISSING if found is None else found[0].text()

    rows = [
        (scores.label(Variant(n, 0)), *(text(n, b, t) for b, t in run.items()))
        for n in (DENSE, *_names(scores, length))
    ]
    by_tasks: dict[str, list[str]] = {}
    for budget, tasks in run.items():
        by_tasks.setdefault(", ".join(tasks), []).append(str(budget))
    told = "; ".join(
        f"{tasks} with {', '.join(budgets)} blocks"
        for tasks, budgets in by_tasks.items()
    )
    return Table(
        f"Tasks that dense solves, at {length:,} tokens: means",
        ("attention", *(f"{budget} blocks" for budget in run)),
        tuple(row for row in rows if {*row[1:]} != {MISSING}),
        f"Over the tasks on which dense scores at least {SOLVED:g} and that SparDA has "
        f"run: {told}. A dash: not all of them were run. 95 % bootstrap intervals.",
    )


def always_run(scores: Scores, length: int) -> list[str]:
    """The tasks of `solved_means` at all budgets."""
    first, *others = _run_tasks(scores, length).values() or ([],)
    return [task for task in first if all(task in tasks for tasks in others)]


def solved_series(scores: Scores, length: int) -> dict[str, list[Point]]:
    """The same means against the share of the blocks that decode reads.

    Over the tasks of every budget alone: a line's points are of the same.
    """
    series: dict[str, list[Point]] = {}
    tasks = always_run(scores, length)
    for budget in _run_tasks(scores, length) if tasks else ():
        for name in (DENSE, *_names(scores, length)):
            found = _solved_mean(scores, length, name, budget, tasks)
            if found is None:
                continue
            mean, share = found
            point = Point(100 * share, mean.mean, mean.low, mean.high)
            points = series.setdefault(scores.label(Variant(name, 0)), [])
            if point not in points:  # as dense's, at every budget
                points.append(point)
    return series


def nearness_table(scores: Scores, length: int, ours: str = _OURS) -> Table | None:
    """Whether SparDA is near dense and own queries, on each task that dense solves.

    Args:
      scores: All records.
      length: Tokens.
      ours: Which way to use a Forecast.

    Returns:
      None without results of it on such a task.
    """
    own_name = OWN_QUERIES[ours]
    rows = []
    for task in _solved(scores, length):
        dense = scores.values(task, length, Variant(DENSE, 0), "score")
        for budget in reversed(_budgets(scores, length)):
            mine = scores.values(task, length, Variant(ours, budget), "score")
            own = scores.values(task, length, Variant(own_name, budget), "score")
            if not mine:
                continue
            row = [task, str(budget), f"{estimate(mine).mean:.1f}"]
            for theirs in (dense, own):
                if len(theirs) != len(mine):
                    row += [MISSING, MISSING]
                    continue
                less = paired_difference([theirs], [mine])
                row.append(f"{estimate(theirs).mean:.1f}, {less.text('+.1f')}")
                row.append("yes" if less.mean >= -WITHIN else "**no**")
            rows.append(tuple(row))
    if not rows:
        return None
    within = f"within {WITHIN:g}"
    return Table(
        f"{ours} beside dense and own queries, at {length:,} tokens",
        ("task", "blocks", ours, "dense", within, f"own queries ({own_name})", within),
        tuple(rows),
        f"Tasks on which dense scores at least {SOLVED:g}. Behind the others' scores: "
        f"{ours} less theirs on the same samples, with 95 % bootstrap intervals; "
        f"'{within}': not more than {WITHIN:g} points below.",
    )
