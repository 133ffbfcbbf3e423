"""Copies of listed blocks on Mosaic GPU: the walk over lists that two kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels._common.operands import Listed

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


@dataclass(frozen=True)
class Walk:
    """Persistent programs over the (entry, part of a block) pairs of a list.

    Attributes:
      listed: entries in all.
      elements: numbers of a block.
      size: numbers of a part.
      programs: programs of the grid's axis "program".
    """

    listed: int
    elements: int
    size: int
    programs: int

    @property
    def parts(self) -> int:
        """Parts of a block."""
        return self.elements // self.size


def part_size(elements: int, dtype: DTypeLike) -> int:
    """Elements of a part: the largest power of two that divides a block and fits.

    Args:
      elements: elements of a block.
      dtype: of each.

    Raises:
      NotImplementedError: for blocks of an odd size, which a warpgroup cannot copy.
    """
    size, itemsize = elements & -elements, jnp.dtype(dtype).itemsize
    while size * itemsize > PART_BYTES:
        size //= 2
    if size * itemsize < 1024:
        raise NotImplementedError(
            f"mosaic_gpu needs blocks of a multiple of 1024 bytes, not {elements} "
            f"elements of {jnp.dtype(dtype)}"
        )
    return size


def launch_walk(
    move: Callable[..., None],
    blocks: Sequence[Any],
    rows: Listed,
    walk: Walk,
    *,
    out_type: Any,
    name: str,
) -> Any:
    """Launches a kernel that moves what is listed, part by part.

    Args:
      move: takes an entry, the row that it lists, the columns of the part, and the
        references to the blocks and results.
      blocks: arrays, or mutable references to them, of rows of a block's elements.
      rows: the list.
      walk: sizes and programs.
      out_type: shapes and dtypes of the results.
      name: of the kernel, in profiles and messages.

    Returns:
      The results.
    """

    def kernel(*refs: Any) -> None:
        held, (indices_ref, count_ref, *results) = (
            refs[: len(blocks)],
            refs[len(blocks) :],
        )
        _walk_listed(
            lambda entry, row, columns: move(entry, row, columns, *held, *results),
            indices_ref,
            count_ref[0],
            walk,
        )

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(walk.programs,),
        grid_names=("program",),
    )(*blocks, rows.indices, rows.looked_at().reshape(1))


def _walk_listed(
    move: Callable[[jax.Array, jax.Array, Any], None],
    indices_ref: Any,
    count: jax.Array,
    walk: Walk,
) -> None:
    """Walks a program over its pairs of an entry that is looked at and a part."""
    listed, parts, size = walk.listed, walk.parts, walk.size
    programs = walk.programs
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
