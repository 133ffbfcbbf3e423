"""The choice on Triton: no sort.

Algorithm: one program a row. The P-th largest score is found by bisection over the bits
of the scores as ordered integers, then the places of what reaches it by a running
count; among equal scores the lowest numbers are kept.

Measured on one H100 (jax 0.11.2, 16 rows, 96 of 513 / 1,025 / 2,053 blocks, durations
in a profile, spread at most 0.3 %): 6.5 / 7.9 / 9.7 us; XLA's sort 11.0 / 14.7 / 24.3.

Limits: at most 16,384 blocks, which a program holds in registers. The back end is
deprecated in JAX; this file can be deleted with it, which leaves XLA's sort.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels._common.devices import require_cuda
from pallas_kernels._common.numerics import NEG_INF, in_32_bit
from pallas_kernels._common.triton import WarpsConfig, next_power_of_two
from pallas_kernels.dispatch import tuned_config
from pallas_kernels.lowering import silence_triton_deprecation

INT_MIN = -(2**31)
MOST_BLOCKS = 16384


@dataclass(frozen=True)
class Config(WarpsConfig):
    """Settings of the kernel."""


def _kernel(scores_ref, own_ref, out_ref, *, blocks: int, budget: int):
    # scores_ref [rows, M], own_ref [rows], out_ref [rows, P + 1]: what is not stored
    # points at the last column, so that no two lanes ever name one place.
    row = pl.program_id(0)
    width = next_power_of_two(blocks)
    column = jnp.arange(width)
    inside = column < blocks
    scores = plt.load(
        scores_ref.at[row, jnp.minimum(column, blocks - 1)], mask=inside, other=NEG_INF
    )
    # Integers in the order of the floats. -0.0 is made 0.0 first, its equal.
    scores = jnp.where(scores == 0.0, 0.0, scores)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = jnp.where(inside & (scores != NEG_INF), order, INT_MIN)

    def bisect(i, least):
        # From the sign bit down: keep the bit when enough scores reach it.
        candidate = least + lax.shift_left(jnp.int32(1), 31 - i)
        enough = (order >= candidate).astype(jnp.int32).sum() >= budget
        return jnp.where(enough, candidate, least)

    least = lax.fori_loop(0, 32, bisect, jnp.int32(INT_MIN))
    above = order > least
    equal = (order == least) & (order != INT_MIN)
    missing = budget - above.astype(jnp.int32).sum()
    chosen = above | (equal & (jnp.cumsum(equal.astype(jnp.int32)) <= missing))
    place = jnp.cumsum(chosen.astype(jnp.int32)) - 1
    found = chosen.astype(jnp.int32).sum()
    slot = jnp.arange(next_power_of_two(budget))
    plt.store(
        out_ref.at[row, jnp.minimum(slot, budget)],
        jnp.full(slot.shape, -1, jnp.int32),
        mask=(slot >= found) & (slot < budget),
    )
    plt.store(
        out_ref.at[row, jnp.where(chosen, place, budget)],
        jnp.where(column <= own_ref[row], column, -1),
        mask=chosen,
    )


@in_32_bit
def choose_blocks_triton(
    scores: Float[Array, "*rows M"],
    own: Int[Array, "*#rows"],
    *,
    budget: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Int[Array, "*rows P"]:
    """Computes the result, in ascending order but for replaced blocks.

    Args:
      scores: float32 scores, -inf for blocks not to be chosen.
      own: number of each row's own block; later ones are replaced by -1.
      budget: how many.
      config: settings; recorded or default ones if None.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The lists; among equal scores the lowest number wins. A replaced block keeps its
      place in the list.

    Raises:
      NotImplementedError: for too many blocks, or without a CUDA device.
    """
    if not interpret:
        require_cuda("triton", 8.0)
    lead, blocks = scores.shape[:-1], scores.shape[-1]
    if blocks > MOST_BLOCKS:
        raise NotImplementedError(
            f"triton chooses among at most {MOST_BLOCKS} blocks, not {blocks}"
        )
    config = config or Config(
        **tuned_config("choose_blocks", "triton", {"M": blocks, "P": budget})
    )
    flat = scores.reshape(-1, blocks)
    silence_triton_deprecation()
    out = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, budget=budget),
        grid=(flat.shape[0],),
        out_shape=jax.ShapeDtypeStruct((flat.shape[0], budget + 1), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="choose_blocks_triton",
    )(flat, jnp.broadcast_to(own, lead).reshape(-1))
    return out[:, :budget].reshape(*lead, budget)
