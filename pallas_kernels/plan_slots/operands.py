"""What every back end of the plan of slots takes, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels._common import validation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The tables of every row's slots, and the blocks that each row asks for.

    The operation says what each of them means. Their order is that of the kernel's
    operands.
    """

    blocks: Int[Array, "*rows C"]
    last_used: Int[Array, "*rows C"]
    page_table: Int[Array, "*rows M"]
    listed: Int[Array, "*rows P"]
    step: Int[Array, "*rows"]
    tail_block: Int[Array, "*rows"]
    source: Int[Array, ""]
    target: Int[Array, ""]

    @property
    def lead(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return self.blocks.shape[:-1]

    @property
    def capacity(self) -> int:
        """C, slots of a row."""
        return self.blocks.shape[-1]

    @property
    def row_blocks(self) -> int:
        """M, blocks of a row."""
        return self.page_table.shape[-1]

    @property
    def budget(self) -> int:
        """P, blocks that a row lists."""
        return self.listed.shape[-1]

    @property
    def rows(self) -> int:
        """R, rows in all."""
        return self.blocks.size // self.capacity


def checked(
    blocks, last_used, page_table, listed, step, tail_block, source, target
) -> Slots:
    """Checks arguments of ``plan_slots`` and brings them to one form.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the operation names.
    """
    validation.require_rows("blocks", blocks, "[*rows, C]")
    rows, capacity = blocks.shape[:-1], blocks.shape[-1]
    validation.require_shape("last_used", last_used, blocks.shape, "*rows C")
    validation.require_rows("page_table", page_table, "[*rows, M]")
    validation.require_shape(
        "page_table", page_table, (*rows, page_table.shape[-1]), "*rows M"
    )
    validation.require_rows("listed", listed, "[*rows, P]")
    validation.require_shape("listed", listed, (*rows, listed.shape[-1]), "*rows P")
    if listed.shape[-1] > capacity:
        raise ValueError(
            f"listed has {listed.shape[-1]} blocks a row and blocks {capacity} slots; "
            "there must be a slot for every listed block"
        )
    source, target = jnp.asarray(source), jnp.asarray(target)
    for name, x in {"step": step, "tail_block": tail_block}.items():
        validation.require_shape(name, x, rows, "*rows")
    for name, x in {"source": source, "target": target}.items():
        validation.require_shape(name, x, (), "")
    arrays = (blocks, last_used, page_table, listed, step, tail_block, source, target)
    for field, x in zip(dataclasses.fields(Slots), arrays, strict=True):
        validation.require_integer(field.name, x)
    return Slots(*(x.astype(jnp.int32) for x in arrays))
