"""Public entry of the commit: checks, then dispatch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels._common import validation
from pallas_kernels.dispatch import Implementation, dispatch

OP = "commit_blocks"


def commit_blocks(
    slots: Float[Array, " R *E"],
    staged: Shaped[Array, " J *E"],
    indices: Int[Array, " J"],
    *,
    scales: Float[Array, "J S"] | None = None,
    count: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, " R *E"]:
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
    validation.require_rows("slots", slots, "[R, ...]")
    validation.require_float("slots", slots)
    validation.require_shape("indices", indices, (None,), "J")
    validation.require_integer("indices", indices)
    expected = (indices.shape[0], *slots.shape[1:])
    validation.require_shape("staged", staged, expected, "J, then as slots")
    if scales is None:
        validation.require_dtype("staged", staged, slots.dtype)
    else:
        _require_int8(slots, staged, scales)
    indices = indices.astype(jnp.int32)
    if count is not None:
        validation.require_shape("count", count, (), "")
        validation.require_integer("count", count)
        count = count.astype(jnp.int32)
    if indices.shape[0] == 0:
        return slots

    def run(name: str) -> Float[Array, " R *E"]:
        if name == "mosaic_gpu":
            if scales is not None:
                raise NotImplementedError("mosaic_gpu has no commit of blocks in int8")
            from pallas_kernels.commit_blocks import pallas_mosaic_gpu

            return pallas_mosaic_gpu.commit_blocks_mosaic_gpu(
                slots, staged, indices, count
            )
        if name == "triton":
            from pallas_kernels.commit_blocks import pallas_triton

            return pallas_triton.commit_blocks_triton(
                slots, staged, indices, count, scales=scales
            )
        from pallas_kernels.commit_blocks.xla import commit_blocks_xla

        listed = indices
        if count is not None:
            entry = jnp.arange(indices.shape[0], dtype=jnp.int32)
            listed = jnp.where(entry < count, indices, -1)
        return commit_blocks_xla(slots, staged, listed, scales)

    return dispatch(OP, implementation, run, {"int8": scales is not None})


def _require_int8(
    slots: Float[Array, " R *E"],
    staged: Shaped[Array, " J *E"],
    scales: Float[Array, "J S"],
) -> None:
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
