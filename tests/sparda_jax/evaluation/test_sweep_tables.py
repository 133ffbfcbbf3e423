"""Tables of a budget sweep: what stands in which cell, and what is not compared."""

import pytest

from sparda_jax.evaluation.run_files import Cell
from sparda_jax.evaluation.sweep_tables import (
    against_table,
    always_run,
    nearness_table,
    solved_means,
    solved_series,
    task_sweep_tables,
)
from sparda_jax.evaluation.tables import (
    MISSING,
    NOT_MEASURED,
    Scores,
    score_table,
)

SETTINGS = {
    "attention": ["dense", "sparda", "quest", "magicpig_tokens"],
    "labels": {"quest": "Quest-style", "magicpig_tokens": "MagicPIG"},
    "tasks": ["passkey", "vt"],
    "floor": 50,
}


def _scores(*found):
    """Scores of cells (task, attention, budget, scores), all at 100 tokens."""
    return Scores(
        {
            Cell(task, 100, attention, budget): [
                {"index": n, "score": score, "tokens": 3, "read": budget / 32 or 1.0}
                for n, score in enumerate(scores)
            ]
            for task, attention, budget, scores in found
        },
        SETTINGS,
    )


@pytest.fixture
def scores():
    return _scores(
        ("passkey", "dense", 0, [100, 100]),
        ("passkey", "magicpig_tokens", 0, [100, 100]),
        ("passkey", "sparda", 4, [100, 0]),
        ("passkey", "sparda", 8, [100, 100]),
        ("passkey", "quest", 8, [0, 0]),
        ("vt", "dense", 0, [40, 40]),  # under the floor
        ("vt", "sparda", 8, [100, 100]),
    )


def test_a_task_s_sweep(scores):
    (table,) = task_sweep_tables(scores, 100)  # vt is not measured
    assert table.title == "passkey at 100 tokens by budget"
    assert table.head == (
        "attention",
        "4 blocks, 12.5 % read",
        "8 blocks, 25.0 % read",
    )
    assert table.rows == (
        ("dense", "100 [100, 100]", "100 [100, 100]"),
        ("MagicPIG", "100 [100, 100]", "100 [100, 100]"),
        ("sparda", "50 [0, 100]", "100 [100, 100]"),
        ("Quest-style", MISSING, "0 [0, 0]"),
    )
    assert task_sweep_tables(_scores(("passkey", "dense", 0, [100])), 100) == []


def test_differences_are_of_measured_tasks_that_both_have_run(scores):
    table = against_table(scores, 100)
    assert table is not None and table.head == ("attention", "4 blocks", "8 blocks")
    assert table.rows == (
        ("dense", "-50.0 [-100.0, +0.0] (1)", "+0.0 [+0.0, +0.0] (1)"),
        ("Quest-style", MISSING, "+100.0 [+100.0, +100.0] (1)"),
    )
    assert against_table(_scores(("passkey", "dense", 0, [100])), 100) is None


def test_tasks_that_dense_solves(scores):
    """Means over what all have run, and who is near whom."""
    means = solved_means(scores, 100)
    assert means is not None and means.head == ("attention", "4 blocks", "8 blocks")
    assert means.rows == (
        ("dense", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"),
        ("sparda", "50.0 [0.0, 100.0]", "100.0 [100.0, 100.0]"),
        ("Quest-style", MISSING, "0.0 [0.0, 0.0]"),
    )
    # A selector that has not run all of them has no mean.
    more = _scores(
        ("passkey", "dense", 0, [100]),
        ("vt", "dense", 0, [95]),
        ("passkey", "sparda", 4, [90]),
        ("passkey", "sparda", 8, [100]),
        ("vt", "sparda", 4, [10]),
        ("passkey", "quest", 4, [80]),
        ("passkey", "quest", 8, [70]),
    )
    few = solved_means(more, 100)
    assert few is not None and few.rows[1:] == (
        ("sparda", "50.0 [50.0, 50.0]", "100.0 [100.0, 100.0]"),
        ("Quest-style", MISSING, "70.0 [70.0, 70.0]"),
    )
    assert "passkey, vt with 4 blocks; passkey with 8 blocks" in few.note
    # A line holds means of the same tasks alone.
    assert always_run(more, 100) == ["passkey"]
    points = solved_series(more, 100)
    assert {k: [p.y for p in v] for k, v in points.items()} == {
        "dense": [100.0],
        "sparda": [90.0, 100.0],
        "Quest-style": [80.0, 70.0],
    }
    none = _scores(("passkey", "dense", 0, [89]), ("passkey", "sparda", 4, [89]))
    assert solved_means(none, 100) is None and nearness_table(none, 100) is None


def test_a_task_without_dense_is_not_measured():
    table = score_table(_scores(("passkey", "sparda", 4, [90])), 100)
    assert table is not None and "no result of dense: passkey" in table.note
    assert table.rows[0][1] == NOT_MEASURED


def test_near_is_two_points():
    near = nearness_table(
        _scores(
            ("passkey", "dense", 0, [100, 100]),
            ("passkey", "sparda", 4, [96, 98]),
            ("passkey", "sparda", 8, [96, 100]),
            ("passkey", "infllm_v2", 8, [99, 100]),
        ),
        100,
    )
    assert near is not None and near.rows == (
        (
            *("passkey", "8", "98.0", "100.0, -2.0 [-4.0, +0.0]", "yes"),
            *("99.5, -1.5 [-3.0, +0.0]", "yes"),
        ),
        (
            *("passkey", "4", "97.0", "100.0, -3.0 [-4.0, -2.0]", "**no**"),
            *(MISSING, MISSING),
        ),
    )


def test_each_way_to_use_a_forecast_has_own_queries_of_its_kind():
    scores = _scores(
        ("passkey", "dense", 0, [100]),
        ("passkey", "sparda", 8, [90]),
        ("passkey", "infllm_v2", 8, [90]),
        ("passkey", "sparda_bounds", 8, [96]),
        ("passkey", "infllm_v2_bounds", 8, [97]),
    )
    near = nearness_table(scores, 100, "sparda_bounds")
    assert near is not None and near.head[2] == "sparda_bounds"
    assert near.rows[0][2:] == (
        *("96.0", "100.0, -4.0 [-4.0, -4.0]", "**no**"),
        *("97.0, -1.0 [-1.0, -1.0]", "yes"),
    )
    against = against_table(scores, 100, "sparda_bounds")
    assert against is not None and against.title.startswith("sparda_bounds less")
    assert [row[0] for row in against.rows] == [
        *("dense", "sparda", "infllm_v2", "infllm_v2_bounds"),
    ]
    assert against.rows[1][1] == "+6.0 [+6.0, +6.0] (1)"
