"""What the plan of a cache's slots consists of."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int


class SlotPlan(NamedTuple):
    """What block lists mean for the slots of their rows.

    Entry n * R + r of the two lists of a fetch is the n-th missing block of row r of R
    rows. However the misses are spread over the rows, their entries so lie in front but
    for gaps, and no scatter is needed to put them there.

    Attributes:
      slots: where each listed block lies, or will; -1 for padding [*rows, P].
      blocks: the slots' contents once the missing blocks are in [*rows, C].
      last_used: step of the last list that asked for a slot's block [*rows, C].
      page_table: the slot of every block then, -1 for none [*rows, M].
      sources: number of each block to be fetched where it comes from, counted through
        all rows, or -1 [P * R].
      targets: number of the slot that each of them goes to, likewise [P * R].
      bound: entries of the lists behind which all are -1, a multiple of R.
      fetched: how many blocks are to be fetched.
      hits: how many listed blocks a slot held already.
    """

    slots: Int[Array, "*rows P"]
    blocks: Int[Array, "*rows C"]
    last_used: Int[Array, "*rows C"]
    page_table: Int[Array, "*rows M"]
    sources: Int[Array, " PR"]
    targets: Int[Array, " PR"]
    bound: Int[Array, ""]
    fetched: Int[Array, ""]
    hits: Int[Array, ""]

    def of_rows(self, lead: tuple[int, ...]) -> SlotPlan:
        """The plan whose tables, of any shape here, are by row [*lead, ...]."""
        return self._replace(
            slots=self.slots.reshape(*lead, -1),
            blocks=self.blocks.reshape(*lead, -1),
            last_used=self.last_used.reshape(*lead, -1),
            page_table=self.page_table.reshape(*lead, -1),
        )
