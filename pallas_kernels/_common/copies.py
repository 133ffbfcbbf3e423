"""The Triton kernel that copies listed blocks, behind the gather and the commit.

Persistent programs walk over (entry of the list, part of a block) pairs. What is copied
from where to where, and what a skipped entry does, is the operation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped

from pallas_kernels._common.operands import Listed
from pallas_kernels._common.triton import launch, require_launch

# The smallest part that is worth a program's turn.
MIN_PART_BYTES = 256

# Copies a part: references to the operands and the result, the entry's number, the row
# that it lists, the columns of the part.
type Move = Callable[[Sequence[Any], Any, Array, Array, Any], None]


@dataclass(frozen=True)
class CopyConfig:
    """Settings of a kernel that copies parts of listed blocks.

    Attributes:
      programs: most persistent programs.
      part_bytes: bytes that a program copies at a time, a power of two.
      num_warps: warps of a program.
    """

    programs: int
    part_bytes: int
    num_warps: int

    def __post_init__(self):
        if self.programs < 1:
            raise ValueError(f"programs is {self.programs}; it must be at least 1")
        part = self.part_bytes
        if part < MIN_PART_BYTES or part & (part - 1):
            raise ValueError(
                f"part_bytes is {part}; it must be a power of two >= {MIN_PART_BYTES}"
            )
        require_launch(self.num_warps, self.num_stages)

    @property
    def num_stages(self) -> int:
        """Depth of the load pipeline."""
        return 1


def copy_listed(
    move: Move,
    blocks: Sequence[Shaped[Array, " _ *E"]],
    rows: Listed,
    *,
    out: jax.ShapeDtypeStruct,
    config: CopyConfig,
    name: str,
    beside: Sequence[Array] = (),
    in_place: bool = False,
    staggered: bool = False,
    interpret: bool = False,
) -> Shaped[Array, " R *E"]:
    """Runs ``move`` for every part of every listed entry.

    Args:
      move: copies one part; sees blocks as rows of their elements.
      blocks: arrays of blocks, all of one shape.
      rows: the list.
      out: shape and dtype of the result.
      config: settings.
      name: of the kernel, in profiles and messages.
      beside: further arrays, which ``move`` sees behind the blocks, as they are.
      in_place: the result is the first array of blocks, updated.
      staggered: a program has another place in every turn. Where each so-and-so-many-th
        entry belongs to one row, no program then has all of that row's.
      interpret: run in Pallas's interpreter, on any device.

    Raises:
      NotImplementedError: for blocks whose size has no power of two of bytes in it.
    """
    shape, dtype = out.shape[1:], out.dtype
    elements, itemsize = blocks[0].size // blocks[0].shape[0], dtype.itemsize
    size = min(elements & -elements, config.part_bytes // itemsize)
    if size * itemsize < MIN_PART_BYTES:
        raise NotImplementedError(
            f"triton needs blocks of a multiple of {MIN_PART_BYTES} bytes, not "
            f"{elements} elements of {dtype}"
        )
    listed, parts = rows.listed, elements // size
    programs = min(config.programs, listed * parts)

    def kernel(*refs):
        *blocks_refs, indices_ref, count_ref, out_ref = refs
        program = pl.program_id(0)
        units = jnp.minimum(count_ref[0], listed) * parts

        def body(i, carry):
            if staggered:
                unit = i * programs + lax.rem(program + i, programs)
            else:
                unit = program + i * programs

            @pl.when(unit < units)
            def _():
                j, part = lax.div(unit, jnp.int32(parts)), lax.rem(unit, parts)
                row = indices_ref[j]
                move(blocks_refs, out_ref, j, row, pl.ds(part * size, size))

            return carry

        lax.fori_loop(0, lax.div(units + programs - 1, programs), body, 0)

    result = launch(
        kernel,
        *(x.reshape(-1, elements) for x in blocks),
        *beside,
        rows.indices,
        rows.looked_at().reshape(1),
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((out.shape[0], elements), dtype),
        config=config,
        interpret=interpret,
        name=name,
        aliases={0: 0} if in_place else {},
    )
    return result.reshape(out.shape[0], *shape)
