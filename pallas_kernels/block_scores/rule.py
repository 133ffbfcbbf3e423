"""The rules that every implementation of the scores follows.

A query at position i, with qb = i // block_size the number of its own block:

* raw form (Forecast, one head a kv head): window m is visible when it starts at or
  before i; its score is the dot product. Windows that reach past i lie in blocks that
  are forced anyway.
* softmax form (own queries, G heads a kv head): window m is visible when it ends at or
  before i; its score is the sum over heads of its softmax weight among the visible
  ones, 0 when it is not visible.
* block b's score is the largest among the windows that touch it: those that start in
  it and the ``kernel_size / kernel_stride - 1`` before them; -inf without any.
* the first blocks and the last ones up to qb are forced: +inf. Blocks after qb are
  -inf, so that they never take a place.

Source: InfLLM-V2 and SparDA as in the reference implementation NVlabs/SparDA
(``modeling_minicpm.py``, ``max_pooling_1d.py``), with two deviations. Scores stay
float32, and blocks after qb are masked before the choice rather than dropped after it
(``mask_future_blocks=False`` gives the reference's order).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._common import validation
from pallas_kernels._common.numerics import NEG_INF

POS_INF = float("inf")


@dataclass(frozen=True)
class Rule:
    """Sizes of windows and blocks, and what is forced.

    Attributes:
      blocks: number of blocks (M).
      block_size: keys of a block.
      kernel_size: keys of a window.
      kernel_stride: keys from one window's start to the next.
      init_blocks: blocks forced at the start.
      local_blocks: blocks forced up to and including the query's own.
      softmax: the softmax form.
      mask_future_blocks: -inf for blocks after the query's own.
      scale: factor of the dot products.
    """

    blocks: int
    block_size: int
    kernel_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    softmax: bool
    mask_future_blocks: bool
    scale: float

    def __post_init__(self):
        for name in ("blocks", "block_size", "kernel_size", "kernel_stride"):
            validation.require_positive(name, getattr(self, name))
        for name in ("init_blocks", "local_blocks"):
            validation.require_non_negative(name, getattr(self, name))
        for name in ("kernel_size", "block_size"):
            if getattr(self, name) % self.kernel_stride:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of "
                    f"kernel_stride, {self.kernel_stride}"
                )

    @property
    def per_block(self) -> int:
        """Windows that start in a block."""
        return self.block_size // self.kernel_stride

    @property
    def before(self) -> int:
        """Windows that start before a block and reach into it."""
        return self.kernel_size // self.kernel_stride - 1

    @property
    def offsets(self) -> int:
        """Windows that touch a block."""
        return self.before + self.per_block

    def visible(
        self, window: Int[Array, ...], position: Int[Array, ...]
    ) -> Bool[Array, ...]:
        """Whether a query at ``position`` may see ``window`` (broadcast)."""
        reach = self.kernel_size - 1 if self.softmax else 0
        return window * self.kernel_stride + reach <= position

    def force(
        self,
        scores: Float[Array, ...],
        block: Int[Array, ...],
        position: Int[Array, ...],
    ) -> Float[Array, ...]:
        """Puts in +inf for forced blocks and -inf for blocks after the query's own."""
        own = position // self.block_size
        forced = (block < self.init_blocks) | (
            (block > own - self.local_blocks) & (block <= own)
        )
        scores = jnp.where(forced, POS_INF, scores)
        if not self.mask_future_blocks:
            return scores
        return jnp.where(block > own, NEG_INF, scores)
