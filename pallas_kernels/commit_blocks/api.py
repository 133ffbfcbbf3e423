"""Public entry of the commit: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels._common import validation
from pallas_kernels.dispatch import Implementation, dispatch

OP = "commit_blocks"


def commit_blocks(
    slots: Float[Array, " R *E"],
    staged: Float[Array, " J *E"],
    indices: Int[Array, " J"],
    *,
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
      staged: as many blocks as there are entries, in the dtype of ``slots``.
      indices: int32 row of each staged block, no row twice; negative ones are skipped.
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
    validation.require_dtype("staged", staged, slots.dtype)
    indices = indices.astype(jnp.int32)
    if count is not None:
        validation.require_shape("count", count, (), "")
        validation.require_integer("count", count)
        count = count.astype(jnp.int32)
    if indices.shape[0] == 0:
        return slots

    def run(name: str) -> Float[Array, " R *E"]:
        if name == "mosaic_gpu":
            from pallas_kernels.commit_blocks import pallas_mosaic_gpu

            return pallas_mosaic_gpu.commit_blocks_mosaic_gpu(
                slots, staged, indices, count
            )
        if name == "triton":
            from pallas_kernels.commit_blocks import pallas_triton

            return pallas_triton.commit_blocks_triton(slots, staged, indices, count)
        from pallas_kernels.commit_blocks.xla import commit_blocks_xla

        listed = indices
        if count is not None:
            entry = jnp.arange(indices.shape[0], dtype=jnp.int32)
            listed = jnp.where(entry < count, indices, -1)
        return commit_blocks_xla(slots, staged, listed)

    return dispatch(OP, implementation, run)


def commit_stored_blocks(
    slots: Float[Array, " R *E"],
    staged: tuple[Shaped[Array, "J ..."], ...],
    indices: Int[Array, " J"],
    decode: Callable[[tuple[Array, ...]], Array],
    *,
    count: Int[Array, ""] | None = None,
) -> Float[Array, " R *E"]:
    """``commit_blocks`` of blocks that are decoded on their way into the slots.

    XLA alone: a loop over the entries that count on a CPU, and on a GPU a scatter that
    takes the decoding in, so that it computes skipped entries as well.

    Args:
      slots, indices, count: as those of ``commit_blocks``.
      staged: what each block is stored as, as many of each array as there are entries.
      decode: makes blocks [n, *E] in the dtype of ``slots`` of n entries of ``staged``.

    Raises:
      ValueError: on shapes or dtypes other than the above.
    """
    from pallas_kernels.commit_blocks.xla import commit_stored_blocks_xla

    validation.require_rows("slots", slots, "[R, ...]")
    validation.require_float("slots", slots)
    validation.require_shape("indices", indices, (None,), "J")
    validation.require_integer("indices", indices)
    for part in staged:
        expected = (indices.shape[0], *part.shape[1:])
        validation.require_shape("staged", part, expected, "J, then any")
    listed = indices.astype(jnp.int32)
    if count is not None:
        entry = jnp.arange(indices.shape[0], dtype=jnp.int32)
        listed = jnp.where(entry < count, listed, -1)
    if indices.shape[0] == 0:
        return slots
    return commit_stored_blocks_xla(slots, staged, listed, decode)
