"""Public entry of the plan: checks, then dispatch."""

from __future__ import annotations

from jaxtyping import Array, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.plan_slots.operands import checked
from pallas_kernels.plan_slots.plan import SlotPlan

OP = "plan_slots"


def plan_slots(
    blocks: Int[Array, "*rows C"],
    last_used: Int[Array, "*rows C"],
    page_table: Int[Array, "*rows M"],
    listed: Int[Array, "*rows P"],
    *,
    step: Int[Array, "*rows"],
    tail_block: Int[Array, "*rows"],
    source: Int[Array, ""] | int,
    target: Int[Array, ""] | int,
    implementation: Implementation | None = None,
) -> SlotPlan:
    """Gives every listed block one of its row's slots, and lists what is missing.

    Every row has C slots for blocks of its own. Listed blocks that lie in a slot stay
    there (hits). The others (misses) take, in the order of the list, the slots that the
    list does not ask for: empty ones first, then the least recently asked for, among
    equals the lowest. A row's tail block, the one that grows, is in every list, so that
    its slot is never taken; it has nothing to fetch when it begins.

    Args:
      blocks: int32 number of the block in each slot, no block twice in a row; -1 in an
        empty slot.
      last_used: int32 step of the last list that asked for it; -1 for never.
      page_table: int32 slot of each of a row's M blocks, -1 for none: what ``blocks``
        says the other way round, so that a block is found without a look at all slots.
      listed: int32 block numbers without duplicates in a row, -1 padded anywhere;
        P is at most C.
      step: int32 step of each row's list; must not go back.
      tail_block: int32 number of each row's tail block. It and later ones are not
        fetched.
      source: int32 number of the first row's block 0 where blocks are fetched from;
        the other rows' M blocks each follow.
      target: int32 number of the first row's slot 0 where they are put; the other
        rows' slots follow.
      implementation: "triton" or "xla"; None for the recorded choice of this device
        kind. A named implementation never falls back.

    Returns:
      The plan.

    Raises:
      ValueError: on shapes, dtypes or sizes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(
        blocks, last_used, page_table, listed, step, tail_block, source, target
    )

    def run(name: str) -> SlotPlan:
        if name == "mosaic_gpu":
            raise NotImplementedError(
                "mosaic_gpu has no plan_slots: it has neither a running count over "
                "lanes nor a store by lane"
            )
        if name == "triton":
            from pallas_kernels.plan_slots import pallas_triton

            return pallas_triton.plan_slots_triton(operands)
        from pallas_kernels.plan_slots.xla import plan_slots_xla

        return plan_slots_xla(operands)

    return dispatch(OP, implementation, run)
