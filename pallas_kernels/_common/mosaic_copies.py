"""Copies of listed blocks on Mosaic GPU: the walk over lists that two kernels share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

# Elements that one warpgroup holds in registers at a time: 64 or 128 each thread.
PART_BYTES = 32 * 1024
AHEAD = 4  # list entries that are read together


@dataclass(frozen=True)
class WalkConfig:
    """Settings of such a kernel.

    Attributes:
      programs: persistent thread blocks.
    """

    programs: int

    def __post_init__(self):
        if self.programs < 1:
            raise ValueError(f"programs is {self.programs}; it must be at least 1")


def part_size(elements: int, itemsize: int) -> int:
    """Elements of a part: the largest power of two that divides a block and fits.

    Args:
      elements: elements of a block.
      itemsize: bytes of one.
    """
    size = elements & -elements
    while size * itemsize > PART_BYTES:
        size //= 2
    return size


def checked_part_size(elements: int, dtype: DTypeLike) -> int:
    """``part_size`` of a block that a warpgroup can copy.

    Raises:
      NotImplementedError: for blocks of an odd size.
    """
    size = part_size(elements, jnp.dtype(dtype).itemsize)
    if size * jnp.dtype(dtype).itemsize < 1024:
        raise NotImplementedError(
            f"mosaic_gpu needs blocks of a multiple of 1024 bytes, not {elements} "
            f"elements of {jnp.dtype(dtype)}"
        )
    return size


def walk_listed(
    move: Callable[[jax.Array, jax.Array, Any], None],
    indices_ref: Any,
    count: jax.Array,
    *,
    listed: int,
    parts: int,
    size: int,
    programs: int,
) -> None:
    """Walks a persistent program over its (entry, part of a block) pairs.

    Args:
      move: takes an entry, the row that it lists and the columns of the part.
      indices_ref: rows of the entries.
      count: entries that are looked at.
      listed: entries in all.
      parts: parts of a block.
      size: elements of a part.
      programs: programs of the grid's axis "program".
    """
    program = lax.axis_index("program")
    units = jnp.minimum(count, listed) * parts
    most, step = listed * parts, programs * AHEAD

    def place_of(turn):
        # Another place in every turn: where each so-and-so-many-th entry belongs to one
        # row, no program has all of that row's.
        return lax.rem(program + turn, jnp.int32(programs))

    def body(i, carry):
        # Several list entries are read before the first is acted upon, so that a
        # skipped one costs a part of a memory latency.
        turns = [i * AHEAD + n for n in range(AHEAD)]
        found = [turn * programs + place_of(turn) for turn in turns]
        places = [lax.div(jnp.minimum(u, most - 1), parts) for u in found]
        rows = [indices_ref[place] for place in places]
        for unit, row in zip(found, rows, strict=True):
            entry = lax.div(unit, jnp.int32(parts))
            columns = pl.ds(lax.rem(unit, jnp.int32(parts)) * size, size)
            pl.when(unit < units)(
                lambda entry=entry, row=row, columns=columns: move(entry, row, columns)
            )
        return carry

    lax.fori_loop(0, lax.div(units + step - 1, step), body, 0)
