"""Public entry of the plan: checks, then dispatch."""

from __future__ import annotations

from jaxtyping import Array, Int

from pallas_kernels._common import validation
from pallas_kernels._common.dispatch import Implementation, dispatch
from pallas_kernels.plan_fetch.reference import FetchPlan

OP = "plan_fetch"


def plan_fetch(
    listed: Int[Array, "N P"],
    held: Int[Array, "N C"],
    used: Int[Array, "N C"],
    stamp: Int[Array, " N"],
    *,
    limit: Int[Array, " N"],
    base: Int[Array, " N"],
    implementation: Implementation | None = None,
) -> FetchPlan:
    """Gives every listed block a slot and packs what must be fetched for it.

    Each of the N rows (a sequence and kv head) has C slots of its own. Listed blocks
    that lie in a slot stay there; the others take the slots that the list does not ask
    for: empty ones first, then those that were asked for the longest time ago, ties by
    slot. The missing blocks of all rows are packed into one list, row by row and in the
    lists' order, so that ``host_gather`` and ``commit_blocks`` look at no others.

    Args:
      listed: int32 block ids without duplicates in a row, −1 for padding anywhere;
        P <= C.
      held: int32 block in each slot, −1 for none.
      used: int32 stamp of the last list that asked for it, at least −1; no larger
        than ``stamp``.
      stamp: int32 time of each row's list.
      limit: int32; a missing block from this one on takes a slot and is not fetched
        (it has no contents on the host yet).
      base: int32 host row of each row's block 0.
      implementation: "triton" or "xla"; None for the recorded choice of this device
        kind. A named implementation never falls back.

    Returns:
      The ``FetchPlan``.

    Raises:
      ValueError: on shapes or dtypes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    validation.require_shape("listed", listed, (None, None), "N P")
    rows, width = listed.shape
    validation.require_shape("held", held, (rows, None), "N C")
    validation.require_shape("used", used, tuple(held.shape), "N C")
    if rows < 1 or not 1 <= width <= held.shape[1]:
        raise ValueError(
            f"listed has shape {tuple(listed.shape)} and held {tuple(held.shape)}; "
            "there must be rows, and 1 <= P <= C"
        )
    for name, x in (("stamp", stamp), ("limit", limit), ("base", base)):
        validation.require_shape(name, x, (rows,), "N")
    arguments = (listed, held, used, stamp, limit, base)
    for name, x in zip(
        ("listed", "held", "used", "stamp", "limit", "base"), arguments, strict=True
    ):
        validation.require_dtype(name, x, "int32")

    def run(name: str) -> FetchPlan:
        if name == "mosaic_gpu":
            raise NotImplementedError("mosaic_gpu has no plan_fetch: nothing to gain")
        if name == "triton":
            from pallas_kernels.plan_fetch import pallas_triton

            return pallas_triton.plan_fetch_triton(*arguments)
        from pallas_kernels.plan_fetch.xla import plan_fetch_xla

        return plan_fetch_xla(*arguments)

    return dispatch(OP, implementation, run)
