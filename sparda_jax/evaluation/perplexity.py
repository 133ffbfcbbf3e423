"""Perplexity of a model on token rows, with whatever attention it was loaded with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparda_jax.config import ConfigError
from sparda_jax.engine.api import forward
from sparda_jax.engine.model import LanguageModel


@jax.jit
def _surprises(
    logits: Float[Array, "T V"], ids: Int[Array, " T"]
) -> Float[Array, " T-1"]:
    """−log p of every token but the first."""
    logits = logits[:-1].astype(jnp.float32)
    found = jnp.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - found


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
        surprises = _surprises(forward(lm, ids), jnp.asarray(ids))
        parts.append(np.asarray(surprises[max(first, 1) - 1 :], np.float64))
    if not parts:
        raise ConfigError("rows is empty: it must hold at least one row")
    return math.exp(float(np.mean(np.concatenate(parts))))
