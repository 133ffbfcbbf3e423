"""Perplexity of a model on token rows, with whatever attention it was loaded with."""

import math
from collections.abc import Sequence

import numpy as np

from sparda_jax.config import ConfigError
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.token_scores import score_tokens


def perplexity(
    lm: LanguageModel, rows: Sequence[Sequence[int] | np.ndarray], *, first: int = 1
) -> float:
    """exp of the mean surprise over the tokens of all rows.

    Args:
      lm: A loaded model.
      rows: Token ids, one text each.
      first: Tokens before this position are context only. With the number of tokens
        that the block budget holds, only those count for which blocks are chosen.

    Raises:
      ConfigError: If no token would count.
    """
    parts = []
    for row in rows:
        ids = np.asarray(row, np.int32)
        if len(ids) <= max(first, 1):
            raise ConfigError(
                f"first={first} is not allowed: it must be below the {len(ids)} tokens "
                "of every row"
            )
        surprises = score_tokens(lm, ids.tolist()).surprises
        parts.append(surprises[max(first, 1) - 1 :].astype(np.float64))
    if not parts:
        raise ConfigError("rows is empty: it must hold at least one row")
    return math.exp(float(np.mean(np.concatenate(parts))))
