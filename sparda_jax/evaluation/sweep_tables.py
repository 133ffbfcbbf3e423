"""Tables of a budget sweep: a column a budget, of single tasks and against SparDA."""

from collections.abc import Sequence

from sparda_jax.evaluation.answers import DENSE
from sparda_jax.evaluation.statistics import estimate, paired_difference
from sparda_jax.evaluation.tables import MISSING, Scores, Table, Variant

_OURS = "sparda"


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


def against_table(scores: Scores, length: int) -> Table | None:
    """SparDA less each other way to attend, on the same samples and at equal budget.

    Args:
      scores: All records.
      length: Tokens.

    Returns:
      None without results of SparDA, or with nothing beside them.
    """
    budgets = _budgets(scores, length)
    others = [DENSE, *(n for n in _names(scores, length) if n != _OURS)]
    rows = []
    for name in others:
        row = [scores.label(Variant(name, 0))]
        for budget in budgets:
            row.append(_difference(scores, length, name, budget))
        if any(text != MISSING for text in row[1:]):
            rows.append(tuple(row))
    if not rows:
        return None
    return Table(
        f"sparda less the others at {length:,} tokens",
        ("attention", *(f"{budget} blocks" for budget in budgets)),
        tuple(rows),
        "Points, on the same samples, mean over the measured tasks that both have run; "
        "in parentheses how many these are. 95 % bootstrap intervals.",
    )


def _difference(scores: Scores, length: int, name: str, budget: int) -> str:
    other = Variant(name, 0 if name == DENSE else budget)
    first: list[Sequence[float]] = []
    second: list[Sequence[float]] = []
    for task in _measured(scores, length):
        theirs = scores.values(task, length, other, "score")
        ours = scores.values(task, length, Variant(_OURS, budget), "score")
        if ours and len(ours) == len(theirs):
            first.append(theirs)
            second.append(ours)
    if not first:
        return MISSING
    return f"{paired_difference(first, second).text('+.1f')} ({len(first)})"
