"""Blocks that are chosen whatever their scores, and those that must not be."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels._common.numerics import NEG_INF

POS_INF = float("inf")


class Forced(NamedTuple):
    """Which blocks a row takes or leaves before its scores are asked.

    Attributes:
      first: blocks at the start that are taken.
      local: blocks up to and including the row's own that are taken.
      mask_future: blocks after the row's own are left out before the choice, not
        dropped after it.
    """

    first: int
    local: int
    mask_future: bool = True

    def check(self) -> None:
        """Raises ValueError for a negative count."""
        validation.require_non_negative("forced.first", self.first)
        validation.require_non_negative("forced.local", self.local)

    def apply(
        self, scores: Float[Array, ...], block: Int[Array, ...], own: Int[Array, ...]
    ) -> Float[Array, ...]:
        """Scores in which +inf means taken, and nothing else does (broadcast).

        What is not a number ranks last, and what has overflowed behind the blocks that
        are taken.
        """
        most = jnp.finfo(jnp.float32).max
        scores = jnp.where(scores != scores, NEG_INF, jnp.minimum(scores, most))
        taken = (block < self.first) | ((block > own - self.local) & (block <= own))
        scores = jnp.where(taken, POS_INF, scores)
        if not self.mask_future:
            return scores
        return jnp.where(block > own, NEG_INF, scores)
