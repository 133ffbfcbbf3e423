"""Public entry of the choice: checks, then dispatch."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels.choose_blocks.forced import Forced
from pallas_kernels.dispatch import Implementation, dispatch

OP = "choose_blocks"


def choose_blocks(
    scores: Float[Array, "*rows M"],
    own: Int[Array, "*#rows"],
    *,
    budget: int,
    forced: Forced | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "*rows P"]:
    """Lists the ``budget`` best blocks of each row of scores.

    What ``select_blocks`` does behind ``block_scores``, for scores that are made
    otherwise. Among equal scores the lowest block number wins. No gradient passes.

    Args:
      scores: float32, -inf for blocks not to be chosen. Without ``forced`` +inf is for
        forced blocks, and none is NaN.
      own: int32 number of each row's own block; a later one that is among the best is
        replaced by -1.
      budget: how many blocks each row lists (P).
      forced: blocks that every row takes and leaves whatever their scores, which may
        then be NaN (ranked last) or +inf (ranked behind forced blocks).
      implementation: "triton" or "xla"; None for the recorded choice of this device
        kind. A named implementation never falls back.

    Returns:
      int32 lists in no particular order, -1 where a row has fewer blocks.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    validation.require_rows("scores", scores, "[*rows, M]")
    validation.require_dtype("scores", scores, jnp.float32)
    validation.require_integer("own", own)
    validation.require_positive("budget", budget)
    if forced is not None:
        forced.check()
    rows = scores.shape[:-1]
    if own.ndim != len(rows) or any(
        size not in (1, whole) for size, whole in zip(own.shape, rows, strict=True)
    ):
        raise ValueError(
            f"own has shape {tuple(own.shape)}; it must be that of the rows, {rows}, "
            "or broadcast to it"
        )
    scores = lax.stop_gradient(scores)
    own = own.astype(jnp.int32)

    def run(name: str) -> Int[Array, "*rows P"]:
        if name == "mosaic_gpu":
            raise NotImplementedError(
                "mosaic_gpu has no choose_blocks: it has neither a running count over "
                "lanes nor a store by lane"
            )
        if name == "triton":
            from pallas_kernels.choose_blocks import pallas_triton

            return pallas_triton.choose_blocks_triton(
                scores, own, budget=budget, forced=forced
            )
        from pallas_kernels.choose_blocks.xla import choose_blocks_xla

        return choose_blocks_xla(scores, own, budget=budget, forced=forced)

    return dispatch(OP, implementation, run)
