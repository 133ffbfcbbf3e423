"""Confidence intervals by resampling; the seed is fixed: equal data, equal ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 2000
_TAIL = 2.5


class Estimate(NamedTuple):
    """A mean with its 95 % bootstrap interval.

    Attributes:
      mean: Of the samples.
      low, high: 2.5 and 97.5 % of the means of resampled samples.
      count: How many samples there are.
    """

    mean: float
    low: float
    high: float
    count: int

    def text(self, form: str = ".1f") -> str:
        """As `87.5 [80.0, 94.1]`."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picks = rng.integers(0, len(values), (_DRAWS, len(values)))
    return values[picks].mean(axis=1)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of samples.

    Args:
      values: One a sample, at least one.
    """
    return mean_of_tasks([values])


def mean_of_tasks(tasks: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the tasks' means; samples are drawn again within each task.

    Args:
      tasks: The samples of each task, at least one.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(values, np.float64) for values in tasks]
    means = np.mean([_resampled(values, rng) for values in arrays], axis=0)
    low, high = np.percentile(means, [_TAIL, 100 - _TAIL])
    middle = float(np.mean([values.mean() for values in arrays]))
    return Estimate(middle, float(low), float(high), sum(map(len, arrays)))


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> Estimate:
    """`second` − `first` of the same samples, task by task, as `mean_of_tasks`.

    Raises:
      ValueError: If a task has not the same number of samples in both.
    """
    return mean_of_tasks(
        [
            [right - left for left, right in zip(before, after, strict=True)]
            for before, after in zip(first, second, strict=True)
        ]
    )
