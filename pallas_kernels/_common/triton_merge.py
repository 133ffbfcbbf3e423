"""Merging attention computed over parts of the keys, as one Triton kernel.

The same as ``splits.merge_splits``, for which XLA makes two kernels: the weights of the
parts, and the weighted sum. One program merges the parts of one query head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels._common.numerics import NEG_INF, finite_or_zero
from pallas_kernels._common.triton import WarpsConfig, launch, next_power_of_two

# A warp holds this many float32 of the parts in registers.
ELEMENTS_A_WARP = 2048


def _kernel(
    out_ref,  # [pairs splits G H]
    lse_ref,  # [pairs splits G]
    merged_ref,  # [pairs G H]
    total_ref,  # [pairs G]
    *,
    splits: int,
    groups: int,
    head_dim: int,
):
    head = pl.program_id(0)
    pair, group = head // groups, head % groups
    split = jnp.arange(next_power_of_two(splits))
    inside = split < splits
    part = (pair * splits + jnp.where(inside, split, 0)) * groups + group
    column = jnp.arange(head_dim)
    at = part[:, None] * head_dim + column[None]
    kept = jnp.broadcast_to(inside[:, None], at.shape)
    values = plt.load(out_ref.at[at], mask=kept, other=0.0)
    lse = plt.load(lse_ref.at[part], mask=inside, other=NEG_INF)
    top = lse.max()
    weights = jnp.exp(lse - finite_or_zero(top))
    total = weights.sum()
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    merged = (values * weights[:, None]).sum(0) / total
    plt.store(merged_ref.at[head * head_dim + column], merged.astype(merged_ref.dtype))
    total_ref[head] = jnp.where(empty, NEG_INF, top + jnp.log(total))


def merge_splits_triton(
    out: Float[Array, "pairs splits G H"],
    lse: Float[Array, "pairs splits G"],
    dtype: Any,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "pairs G H"], Float[Array, "pairs G"]]:
    """Merges normalised partial outputs through their log-sum-exps.

    Args:
      out: partial outputs, float32; H is a power of two.
      lse: log-sum-exp of each part, float32; -inf for a part without keys.
      dtype: of the output.
      interpret: run in Pallas's interpreter, on any device.

    Returns:
      The output in ``dtype`` and the float32 log-sum-exp over all parts; 0 and -inf
      without keys.
    """
    pairs, splits, groups, head_dim = out.shape
    elements = next_power_of_two(splits) * head_dim
    merged, total = launch(
        functools.partial(_kernel, splits=splits, groups=groups, head_dim=head_dim),
        out.reshape(-1),
        lse.reshape(-1),
        grid=(pairs * groups,),
        out_shape=(
            jax.ShapeDtypeStruct((pairs * groups * head_dim,), dtype),
            jax.ShapeDtypeStruct((pairs * groups,), jnp.float32),
        ),
        config=WarpsConfig(max(1, min(8, elements // ELEMENTS_A_WARP))),
        interpret=interpret,
        name="merge_splits_triton",
    )
    return merged.reshape(pairs, groups, head_dim), total.reshape(pairs, groups)
