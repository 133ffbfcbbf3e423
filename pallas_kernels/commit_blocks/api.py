"""Public entry of the commit: checks, then dispatch."""

from __future__ import annotations

from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.commit_blocks.operands import checked
from pallas_kernels.dispatch import Implementation, dispatch

OP = "commit_blocks"


def commit_blocks(
    slots: Shaped[Array, " R *E"],
    staged: Shaped[Array, " J *E"],
    indices: Int[Array, " J"],
    *,
    scales: Float[Array, "J S"] | None = None,
    count: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Shaped[Array, " R *E"]:
    """Writes staged blocks to the listed rows of a device array, in place under `jit`.

    The counterpart of ``host_gather``: a fetch that runs beside compute writes to a
    staging area, and its blocks are put where attention reads them afterwards. The
    bytes moved follow the entries that are not skipped; a skipped entry's staged block
    is never read and may hold anything.

    Args:
      slots: rows of any shape. Donate it (or carry it through a loop): the Pallas form
        updates it in place.
      staged: as many blocks as there are entries, in the dtype of ``slots``; with
        ``scales`` in int8.
      indices: int32 row of each staged block, no row twice; negative ones are skipped.
      scales: float32 scales of blocks [block, 2, H] in 8 bits, which are decoded on the
        way (``int8.py``): of K's H channels, of V's tokens, then any padding.
      count: int32 scalar: only the first so many entries are looked at.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      ``slots`` with the blocks in it.

    Raises:
      ValueError: on shapes or dtypes other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(slots, staged, indices, scales=scales, count=count)
    if operands.listed == 0:
        return slots

    def run(name: str) -> Shaped[Array, " R *E"]:
        if name == "mosaic_gpu":
            if scales is not None:
                raise NotImplementedError("mosaic_gpu has no commit of blocks in int8")
            from pallas_kernels.commit_blocks import pallas_mosaic_gpu

            return pallas_mosaic_gpu.commit_blocks_mosaic_gpu(operands)
        if name == "triton":
            from pallas_kernels.commit_blocks import pallas_triton

            return pallas_triton.commit_blocks_triton(operands)
        from pallas_kernels.commit_blocks.xla import commit_blocks_xla

        return commit_blocks_xla(operands)

    return dispatch(OP, implementation, run, {"int8": scales is not None})
