"""The choice on Triton: no sort.

Algorithm: one program a row. The P-th largest score is found by bisection over the bits
of the scores as ordered integers, until just P reach it, then the places of what
reaches it by a running count; among equal scores the lowest numbers are kept. Forced
and future blocks are settled as scores are loaded, and a row that may only look back
takes a quarter, a half or all of the lanes, as its own block asks.

Measured on one H200 (jax 0.11.2, commit b3727de, 16 rows, 96 of 512 / 1,024 / 2,048
blocks, durations in a profile, spread at most 0.2 %): 4.8 / 5.8 / 7.4 us; XLA's sort
6.6 / 9.8 / 16.8. On one H100, before commit 3da9590 changed the kernel (commit 442281b,
520 / 1,032 / 2,056 blocks): 7.5 / 8.7 / 10.4; XLA's sort 9.8 / 13.7 / 22.6.
In a prefill of 131,072 tokens, two kv heads, room for 3,072 blocks: 4.6 ms a layer,
8.9 before rows took their own number of lanes and bisection stopped early.

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
from pallas_kernels._common.triton import WarpsConfig, launch, next_power_of_two
from pallas_kernels.choose_blocks.forced import Forced
from pallas_kernels.dispatch import tuned_config

INT_MIN = -(2**31)
MOST_BLOCKS = 16384
# Fewer lanes than this are not worth a variant of the kernel.
LEAST_LANES = 256


@dataclass(frozen=True)
class Config(WarpsConfig):
    """Settings of the kernel."""


def _kernel(scores_ref, own_ref, out_ref, *, blocks: int, **static):
    row = pl.program_id(0)
    own = own_ref[row]
    width = next_power_of_two(blocks)
    forced = static["forced"]
    widths = [width]
    if forced is not None and forced.mask_future:
        # Blocks after the row's own need not be looked at: early rows take fewer lanes.
        widths = [w for w in (width // 4, width // 2) if w >= LEAST_LANES] + widths

    def choose_among(widths: list[int]) -> None:
        if len(widths) == 1:
            _choose(scores_ref, own, out_ref, row, blocks, width=widths[0], **static)
            return
        pl.when(own < widths[0])(lambda: choose_among(widths[:1]))
        pl.when(own >= widths[0])(lambda: choose_among(widths[1:]))

    choose_among(widths)


def _choose(scores_ref, own, out_ref, row, blocks, *, width, budget, forced):
    # scores_ref [rows, M], out_ref [rows, P + 1]: what is not stored points at the last
    # column, so that no two lanes ever name one place.
    column = jnp.arange(width)
    inside = column < blocks
    scores = plt.load(
        scores_ref.at[row, jnp.minimum(column, blocks - 1)], mask=inside, other=NEG_INF
    )
    if forced is not None:
        scores = forced.apply(scores, column, own)
    # Integers in the order of the floats. -0.0 is made 0.0 first, its equal.
    scores = jnp.where(scores == 0.0, 0.0, scores)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = jnp.where(inside & (scores != NEG_INF), order, INT_MIN)

    def undecided(state):
        bit, _, reached = state
        return (bit >= 0) & (reached != budget)

    def bisect(state):
        # From the sign bit down: keep the bit when enough scores reach it. When just
        # enough do, the lower bits change nothing.
        bit, least, reached = state
        candidate = least + lax.shift_left(jnp.int32(1), bit)
        count = (order >= candidate).astype(jnp.int32).sum()
        enough = count >= budget
        return (
            bit - 1,
            jnp.where(enough, candidate, least),
            jnp.where(enough, count, reached),
        )

    start = (jnp.int32(31), jnp.int32(INT_MIN), jnp.int32(width))
    _, least, _ = lax.while_loop(undecided, bisect, start)
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
        jnp.where(column <= own, column, -1),
        mask=chosen,
    )


@in_32_bit
def choose_blocks_triton(
    scores: Float[Array, "*rows M"],
    own: Int[Array, "*#rows"],
    *,
    budget: int,
    forced: Forced | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Int[Array, "*rows P"]:
    """Computes the result, in ascending order but for replaced blocks.

    Args:
      scores: float32 scores, -inf for blocks not to be chosen.
      own: number of each row's own block; later ones are replaced by -1.
      budget: how many.
      forced: blocks that are taken or left out before scores are asked.
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
    out = launch(
        functools.partial(_kernel, blocks=blocks, budget=budget, forced=forced),
        flat,
        jnp.broadcast_to(own, lead).reshape(-1),
        grid=(flat.shape[0],),
        out_shape=jax.ShapeDtypeStruct((flat.shape[0], budget + 1), jnp.int32),
        config=config,
        interpret=interpret,
        name="choose_blocks_triton",
    )
    return out[:, :budget].reshape(*lead, budget)
