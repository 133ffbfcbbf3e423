"""Public entries of block scoring: checks, then dispatch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import validation
from pallas_kernels.block_scores.rule import Rule
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
    args, rule = _checked(
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

    return _serve(0, args, implementation, return_lse, rule)


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
    args, rule = _checked(
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

    return _serve(1, args, implementation, return_lse, rule, budget=budget)


def _serve(
    which: int,
    args,
    implementation: Implementation | None,
    return_lse: bool,
    rule: Rule,
    **more: int,
) -> Any:
    """Calls one of the two functions of the implementation that takes the call."""

    def run(name: str) -> tuple[Array, Array | None]:
        return _module(name)[which](*args, lse=return_lse, rule=rule, **more)

    result, lse = dispatch(OP, implementation, run, {"softmax": rule.softmax})
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


def _checked(
    query, compressed_keys, q_start, num_windows, layer, softmax, scale, **sizes
):
    """Checks the arguments and brings them to one form."""
    validation.require_shape("query", query, (None,) * 4, "B T N H")
    validation.require_float("query", query)
    batch, tokens, heads, head_dim = query.shape
    if tokens < 1:
        raise ValueError("query holds no token (T = 0); T must be at least 1")
    rank = 4 if layer is None else 5
    if compressed_keys.ndim != rank:
        raise ValueError(
            f"compressed_keys has shape {tuple(compressed_keys.shape)} with "
            f"layer={layer!r}; it must be [B K W H], with a leading L axis exactly "
            "when layer is given"
        )
    if layer is None:
        compressed_keys, layer = compressed_keys[None], 0
    elif isinstance(layer, int):
        if not 0 <= layer < compressed_keys.shape[0]:
            count = compressed_keys.shape[0]
            raise ValueError(f"layer is {layer}; allowed: 0 .. {count - 1}")
    else:
        validation.require_integer("layer", layer)
        validation.require_shape("layer", layer, (), "")
    validation.require_shape(
        "compressed_keys",
        compressed_keys,
        (None, batch, None, None, head_dim),
        "L B K W H",
    )
    validation.require_dtype("compressed_keys", compressed_keys, query.dtype)
    kv_heads, windows = compressed_keys.shape[2:4]
    groups = validation.require_groups(heads, kv_heads)
    if groups > 1 and not softmax:
        raise ValueError(
            f"query has {heads} heads for {kv_heads} kv heads; the raw form takes one "
            "head a kv head (softmax=True sums the heads' weights)"
        )
    validation.require_shape("q_start", q_start, (batch,), "B")
    validation.require_integer("q_start", q_start)
    if num_windows is None:
        num_windows = jnp.full((batch,), windows, jnp.int32)
    validation.require_shape("num_windows", num_windows, (batch,), "B")
    validation.require_integer("num_windows", num_windows)
    if scale is None and not softmax:
        scale = 1.0
    rule = Rule(
        softmax=softmax,
        scale=validation.require_scale(scale, head_dim),
        **sizes,
    )
    args = (
        query,
        compressed_keys,
        q_start.astype(jnp.int32),
        num_windows.astype(jnp.int32),
        jnp.asarray(layer, jnp.int32),
    )
    return args, rule
