"""Scores of right, wrong and near-miss answers; intervals."""

import json

import numpy as np
import pytest

from sparda_jax.evaluation.scoring import METRICS
from sparda_jax.evaluation.statistics import (
    estimate,
    mean_of_tasks,
    paired_difference,
)

RECORD = json.dumps({"founded": 1801, "director": "Falk", "symbol": "sea horse"})


@pytest.mark.parametrize(
    ("metric", "text", "outputs", "score"),
    [
        ("all", "it is 1234567.", ["1234567"], 100),
        ("all", "it is 1234568.", ["1234567"], 0),
        ("all", "it is 123456", ["1234567"], 0),
        ("all", "A, b and x", ["a", "B", "c", "D"], 75),  # "and" holds an a and a d
        ("all", "", ["a"], 0),
        ("any", "Paris", ["london", "paris"], 100),
        ("any", "Rome", ["london", "paris"], 0),
        ("prefixed", "XyZ the whole text", ["XyZ", "the whole text"], 100),
        ("prefixed", "the whole text", ["XyZ", "the whole text"], 0),
        ("prefixed", "xyz the whole text", ["XyZ", "the whole text"], 0),
        ("fields", RECORD, [RECORD], 100),
        ("fields", f"```json\n{RECORD}\n``` Done.", [RECORD], 100),
        ("fields", '{"founded": "1801", "director": "falk."}', [RECORD], 200 / 3),
        ("fields", '{"founded": 1802, "director": "Falke"}', [RECORD], 0),
        ("fields", '{"founded": 1801, "director": "Falk", "symb', [RECORD], 200 / 3),
        ("fields", "no object", [RECORD], 0),
        ("choice", "The correct answer is (B).", ["B"], 100),
        ("choice", "**The correct answer is (B)**", ["B"], 100),
        ("choice", "The correct answer is C", ["B"], 0),
        ("choice", "B", ["B"], 0),
    ],
)
def test_answers(metric, text, outputs, score):
    assert METRICS[metric](text, outputs) == pytest.approx(score)


def test_a_near_miss_of_a_copied_text_scores_in_between():
    wanted = ["XyZ", "one two three four five six"]
    score = METRICS["prefixed"]("XyZ one two three four five", wanted)
    assert 80 < score < 100


def test_intervals_hold_the_mean_and_shrink_with_samples():
    few, many = estimate([0.0, 100.0] * 10), estimate([0.0, 100.0] * 200)
    for found in (few, many):
        assert found.low < found.mean == 50 < found.high
    assert few.high - few.low > 3 * (many.high - many.low)
    assert estimate([100.0] * 20) == (100, 100, 100, 20)
    assert estimate([0.0, 100.0] * 10) == few
    # Nine of ten 95 % intervals and more hold the true mean.
    rng = np.random.default_rng(1)
    draws = [estimate((100.0 * (rng.random(40) < 0.7)).tolist()) for _ in range(60)]
    assert sum(d.low <= 70 <= d.high for d in draws) >= 52


def test_pairs_are_compared_within_their_sample():
    """A loss of one point everywhere is sure, however far the samples are apart."""
    before = [[0.0, 50.0, 100.0], [20.0, 80.0]]
    after = [[x - 1 for x in values] for values in before]
    assert paired_difference(before, after)[:3] == pytest.approx((-1, -1, -1))
    assert mean_of_tasks(before).mean == 50
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([[1.0, 2.0]], [[1.0]])
