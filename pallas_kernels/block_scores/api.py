"""Public entries of block scoring: checks, then dispatch."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels.block_scores.operands import Scoring, checked
from pallas_kernels.block_scores.xla import scratch_bytes
from pallas_kernels.dispatch import Implementation, dispatch

__all__ = ["OP", "block_scores", "scratch_bytes", "select_blocks"]

OP = "block_scores"


def block_scores(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "*L B K W H"],
    *,
    q_start: Int[Array, " B"],
    blocks: int,
    num_windows: Int[Array, " B"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 33,
    softmax: bool = False,
    scale: float | None = None,
    mask_future_blocks: bool = True,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T M"] | tuple[Float[Array, "B K T M"], Float[Array, "B T N"]]:
    """Scores blocks of keys for each query through compressed keys.

    ``block_scores/rule.py`` states the rules. Scores of windows are not written to
    memory; scores of blocks are, so that for long T ``select_blocks`` is the one to
    call. Forward only.

    Args:
      query: Forecast, one head a kv head (N = K), or with ``softmax`` the layer's own
        queries; T consecutive positions.
      compressed_keys: means of windows in the dtype of ``query`` (``compress_keys``),
        with ``layer`` a stack of them.
      q_start: int32, position of the first query of each row.
      blocks: number of blocks to score (M).
      num_windows: int32, complete windows of each row; all W by default.
      layer: which layer of a stacked ``compressed_keys``.
      block_size: keys of a block, a multiple of ``kernel_stride``.
      kernel_size: keys of a window, a multiple of ``kernel_stride``.
      kernel_stride: keys from one window's start to the next.
      init_blocks: blocks forced at the start.
      local_blocks: blocks forced up to and including the query's own.
      softmax: sum of the heads' softmax weights rather than the raw dot product.
      scale: factor of the dot products; 1 for the raw form and ``H ** -0.5`` for the
        softmax form by default.
      mask_future_blocks: keep blocks after the query's own out (the reference
        implementation drops them after the choice).
      return_lse: also return the log-sum-exp of each head's visible logits.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      float32 scores, +inf for forced blocks and -inf for those not to be chosen; with
      ``return_lse`` also the float32 log-sum-exp, -inf where nothing is visible.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(
        query,
        compressed_keys,
        q_start,
        num_windows,
        layer,
        softmax,
        scale,
        blocks=blocks,
        block_size=block_size,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        mask_future_blocks=mask_future_blocks,
    )
    return _serve(0, operands, implementation, return_lse)


def select_blocks(
    query: Float[Array, "B T N H"],
    compressed_keys: Float[Array, "*L B K W H"],
    *,
    q_start: Int[Array, " B"],
    blocks: int,
    budget: int,
    num_windows: Int[Array, " B"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 33,
    softmax: bool = False,
    scale: float | None = None,
    mask_future_blocks: bool = True,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Int[Array, "B K T P"] | tuple[Int[Array, "B K T P"], Float[Array, "B T N"]]:
    """Scores blocks as ``block_scores`` does and returns the best ``budget`` of them.

    Neither T x W nor T x M exists in memory: tiles of queries are scored and chosen
    from in turn. Among equal scores the lowest block number wins.

    Args:
      query: as in ``block_scores``, like the other arguments not named here.
      compressed_keys: means of windows.
      q_start: first positions.
      blocks: number of blocks (M).
      budget: how many blocks each query lists (P), forced ones included.
      num_windows: complete windows of each row.
      layer: which layer of a stack.
      block_size: keys of a block.
      kernel_size: keys of a window.
      kernel_stride: keys between windows.
      init_blocks: forced at the start.
      local_blocks: forced up to the query's own.
      softmax: the softmax form.
      scale: factor of the dot products.
      mask_future_blocks: keep future blocks out before the choice.
      return_lse: also return the log-sum-exp.
      implementation: "mosaic_gpu", "triton" or "xla", or None.

    Returns:
      int32 lists for ``block_sparse_attention``, in no particular order, -1 where a
      query has fewer blocks; with ``return_lse`` also the log-sum-exp.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    validation.require_positive("budget", budget)
    operands = checked(
        query,
        compressed_keys,
        q_start,
        num_windows,
        layer,
        softmax,
        scale,
        blocks=blocks,
        block_size=block_size,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        mask_future_blocks=mask_future_blocks,
    )
    return _serve(1, operands, implementation, return_lse, budget=budget)


def _serve(
    which: int,
    operands: Scoring,
    implementation: Implementation | None,
    return_lse: bool,
    **more: int,
) -> Any:
    """Calls one of the two functions of the implementation that takes the call."""

    def run(name: str) -> tuple[Array, Array | None]:
        return _module(name)[which](operands, lse=return_lse, **more)

    result, lse = dispatch(OP, implementation, run, {"softmax": operands.rule.softmax})
    if not return_lse:
        return result
    assert lse is not None
    return result, lse


def _module(name: str) -> tuple[Any, Any]:
    """The two functions behind a name. Pallas modules are imported on first use."""
    if name == "mosaic_gpu":
        from pallas_kernels.block_scores import pallas_mosaic_gpu as mosaic

        return mosaic.block_scores_mosaic_gpu, mosaic.select_blocks_mosaic_gpu
    if name == "triton":
        from pallas_kernels.block_scores import pallas_triton as triton

        return triton.block_scores_triton, triton.select_blocks_triton
    from pallas_kernels.block_scores import xla

    return xla.block_scores_xla, xla.select_blocks_xla
