"""What the Mosaic GPU kernels share (Hopper: wgmma, TMA, 227 KiB of shared memory)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import gpu

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import LOG2_E
from pallas_kernels._common.operands import Attended

# A warpgroup's matrix instruction has 64 rows.
WARPGROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
# Finite stand-in for -inf as a running maximum: the difference of two is never NaN.
LOWEST = -1e30


def operand_transforms() -> tuple[Any, ...]:
    """Layout of a 16-bit shared-memory tile that TMA writes and wgmma reads."""
    return (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def require_mosaic_sizes(dtype: Any, head_dim: int, block: int) -> None:
    """Refuses what the Mosaic kernels cannot tile.

    Raises:
      NotImplementedError: naming the size or dtype, or the missing device.
    """
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"mosaic_gpu needs bfloat16 or float16 for wgmma, not {jnp.dtype(dtype)}"
        )
    if head_dim % 64 or not 64 <= head_dim <= 256:
        raise NotImplementedError(
            f"mosaic_gpu needs a head dim of 64, 128, 192 or 256, not {head_dim}"
        )
    if block not in (16, 32, 64, 128):
        raise NotImplementedError(
            f"mosaic_gpu needs a block size of 16, 32, 64 or 128, not {block}"
        )
    # Hopper has the matrix instruction wgmma; later devices have others.
    require_cuda("mosaic_gpu", 9.0, below=10.0)


def require_attention_sizes(operands: Attended, groups: int) -> None:
    """Refuses what the attention kernels cannot tile.

    Raises:
      NotImplementedError: naming the size, or the missing device.
    """
    require_mosaic_sizes(operands.kv.dtype, operands.head_dim, operands.block)
    if groups > WARPGROUP_ROWS:
        raise NotImplementedError(
            f"mosaic_gpu needs at most {WARPGROUP_ROWS} query heads a kv head, not "
            f"{groups}"
        )
    if operands.scale <= 0:
        raise NotImplementedError(
            f"mosaic_gpu needs a positive scale, not {operands.scale}"
        )


def fill_and_refill(
    fetch: Callable[[jax.Array, jax.Array | int], None],
    steps: jax.Array,
    stages: int,
    done: Sequence[Any],
) -> None:
    """The memory warpgroup's loop: fills a ring, then refills what was read.

    Args:
      fetch: starts the copies of a step into a stage.
      steps: steps in all.
      stages: stages of the ring.
      done: for each operand, barriers by stage at which its readers arrive.
    """
    for stage in range(stages):

        @pl.when(stage < steps)
        def _fill(stage=stage):
            fetch(jnp.int32(stage), stage)

    def refill(step, carry):
        stage = lax.rem(step, jnp.int32(stages))
        for barriers in done:
            plgpu.barrier_wait(barriers.at[stage])
        fetch(step, stage)
        return carry

    lax.fori_loop(stages, jnp.maximum(steps, stages), refill, 0)


def softmax_start(head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accumulator, running maximum and sum of a warpgroup's rows, float32."""

    def filled(value, layout, *shape):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        filled(0.0, plgpu.Layout.WGMMA, WARPGROUP_ROWS, head_dim),
        filled(LOWEST, rows, WARPGROUP_ROWS),
        filled(0.0, rows, WARPGROUP_ROWS),
    )


def bias_row(bias_ref: Any, shape: tuple[int, int]) -> jax.Array:
    """A key bias in shared memory as a term of logits in base 2."""
    bias = plgpu.load(bias_ref, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(bias * LOG2_E, shape, [1])


def cluster_fence() -> None:
    """Orders shared-memory accesses with those of the cluster's other blocks."""

    @plgpu.inline_mgpu()
    def fence(_):
        mgpu_utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)

    fence()


def store_rows(value: jax.Array, ref: Any, layout: Any) -> None:
    """Stores row by row, without the tiling that an assignment may choose.

    Another thread block reads what lies there by address.

    Args:
      value: array in ``layout``.
      ref: shared memory of the same shape.
      layout: of the value in registers.
    """

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, x, local):
        x.store_untiled(local, optimized=False)

    store(value, ref)


def load_from_member(ref: Any, shape: tuple[int, ...], member: int) -> jax.Array:
    """Loads float32 values from the shared memory of another block of the cluster.

    ``plgpu.cluster_ref`` would say it, but does not take a part of a reference.

    Args:
      ref: contiguous shared memory of ``shape``, as this block names it.
      shape: a multiple of 128 elements.
      member: the block's index in a one-dimensional cluster.
    """
    width = min(4, math.prod(shape) // 128)
    layout = plgpu.Layout.WG_STRIDED(shape, width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            shape, jnp.dtype(jnp.float32), layout=layout
        ),
    )
    def load(_, local):
        index = mgpu.c(member, ir.IndexType.get())
        there = mgpu.get_cluster_ref(local, gpu.Dimension.x, index)
        return mgpu.FragmentedArray.load_strided(there, vec_size=width)

    return load(ref)
