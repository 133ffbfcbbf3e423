"""The definition of the choice."""

from __future__ import annotations

import numpy as np

from pallas_kernels._common.numerics import NEG_INF


def choose_blocks_reference(
    scores: np.ndarray, own: np.ndarray, budget: int
) -> np.ndarray:
    """The ``budget`` best blocks of each row; ties go to the lowest number.

    Args:
      scores: [*rows, M].
      own: [*rows] or fewer of them to broadcast, number of the query's own block.
      budget: how many.

    Returns:
      [*rows, budget] block numbers in ascending order, then -1.
    """
    own = np.broadcast_to(own, scores.shape[:-1])
    out = np.full((*scores.shape[:-1], budget), -1, np.int32)
    for at in np.ndindex(scores.shape[:-1]):
        row = scores[at]
        best = np.argsort(-row, kind="stable")[:budget]
        best = best[(row[best] != NEG_INF) & (best <= own[at])]
        out[at][: best.size] = np.sort(best)
    return out
