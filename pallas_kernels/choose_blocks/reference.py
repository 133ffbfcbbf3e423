"""The definition of the choice."""

from __future__ import annotations

import numpy as np

from pallas_kernels._common.numerics import NEG_INF
from pallas_kernels.choose_blocks.forced import Forced


def choose_blocks_reference(
    scores: np.ndarray, own: np.ndarray, budget: int, forced: Forced | None = None
) -> np.ndarray:
    """The ``budget`` best blocks of each row; ties go to the lowest number.

    Args:
      scores: [*rows, M].
      own: [*rows] or fewer of them to broadcast, number of the query's own block.
      budget: how many.
      forced: blocks that are taken or left out before scores are asked.

    Returns:
      [*rows, budget] block numbers in ascending order, then -1.
    """
    own = np.broadcast_to(own, scores.shape[:-1])
    out = np.full((*scores.shape[:-1], budget), -1, np.int32)
    for at in np.ndindex(scores.shape[:-1]):
        row = scores[at]
        if forced is not None:
            row = _force(row, int(own[at]), forced)
        best = np.argsort(-row, kind="stable")[:budget]
        best = best[(row[best] != NEG_INF) & (best <= own[at])]
        out[at][: best.size] = np.sort(best)
    return out


def _force(row: np.ndarray, own: int, forced: Forced) -> np.ndarray:
    """A row of scores in which +inf means taken, block by block."""
    out = np.full_like(row, NEG_INF)
    for block, score in enumerate(row):
        if block < forced.first or own - forced.local < block <= own:
            out[block] = np.inf
        elif not np.isnan(score):
            out[block] = min(score, np.finfo(np.float32).max)
        if forced.mask_future and block > own:
            out[block] = NEG_INF
    return out
