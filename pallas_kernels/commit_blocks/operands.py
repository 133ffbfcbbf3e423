"""What every back end of the commit takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels._common import validation
from pallas_kernels._common.operands import Listed


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Commit(Listed):
    """Staged blocks and the rows that they go to, no row twice.

    Attributes:
      slots: rows of any shape, to be updated: of numbers, or of integers of 8 bits.
      staged: as many blocks as there are entries, in the dtype of ``slots``; with
        ``scales`` int8.
      scales: float32, of staged blocks in 8 bits (``int8.py``); or None.
    """

    slots: Shaped[Array, " R *E"]
    staged: Shaped[Array, " J *E"]
    scales: Float[Array, "J S"] | None

    @property
    def elements(self) -> int:
        """Numbers of a block."""
        return self.slots.size // self.slots.shape[0]


def checked(slots, staged, indices, *, scales=None, count=None) -> Commit:
    """Checks arguments of ``commit_blocks`` and brings them to one form.

    Raises:
      ValueError: on shapes or dtypes other than the operation names.
    """
    validation.require_rows("slots", slots, "[R, ...]")
    if slots.dtype != jnp.int8 or scales is not None:
        validation.require_float("slots", slots)
    rows = validation.listed(indices, count)
    expected = (indices.shape[0], *slots.shape[1:])
    validation.require_shape("staged", staged, expected, "J, then as slots")
    if scales is None:
        validation.require_dtype("staged", staged, slots.dtype)
    else:
        _require_int8(slots, staged, scales)
    return Commit(slots=slots, staged=staged, scales=scales, **rows)


def _require_int8(slots, staged, scales) -> None:
    """Raises ValueError for blocks that cannot be decoded."""
    if slots.ndim != 4 or slots.shape[2] != 2:
        raise ValueError(
            f"slots has shape {slots.shape}; with scales it must be [R, block, 2, H]"
        )
    validation.require_dtype("staged", staged, jnp.int8)
    validation.require_dtype("scales", scales, jnp.float32)
    validation.require_shape("scales", scales, (staged.shape[0], None), "J S")
    least = slots.shape[1] + slots.shape[3]
    if scales.shape[1] < least:
        raise ValueError(
            f"scales has shape {scales.shape}; it must have at least {least} for a "
            "block: K's channels and V's tokens"
        )
