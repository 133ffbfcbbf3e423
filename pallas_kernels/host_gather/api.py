"""Public entry of the host gather: checks, then dispatch."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels._common import validation
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.host_gather.operands import checked

OP = "host_gather"


def host_gather(
    blocks: Shaped[Array, " R *E"],
    indices: Int[Array, " J"],
    *,
    count: Int[Array, ""] | None = None,
    skipped: Literal["zero", "undefined"] = "zero",
    programs: int | None = None,
    implementation: Implementation | None = None,
) -> Shaped[Array, " J *E"]:
    """Fetches listed blocks out of host memory into a device array.

    On a GPU the Pallas forms read a ``pinned_host`` operand in place, without a copy
    on the host and without computation there; a few persistent programs saturate the
    link. Run it beside compute with ``compute_on("gpu_stream:1")``.

    Args:
      blocks: rows of any shape and type, in ``pinned_host`` or device memory.
      indices: int32 rows to fetch, any order; negative entries are skipped.
      count: int32 scalar: only the first so many entries are looked at, so that a list
        whose entries to fetch come first costs nothing for the rest. Needs
        ``skipped="undefined"``.
      skipped: what rows of skipped entries hold: zeros, or nothing defined, so that
        nothing is written for them and the bytes moved follow the entries fetched.
      programs: persistent programs of the Pallas forms; recorded or default if None.
      implementation: "mosaic_gpu", "triton" or "xla"; None for the recorded choice
        of this device kind. A named implementation never falls back.

    Returns:
      The rows in device memory; where an entry was skipped, as ``skipped`` says.

    Raises:
      ValueError: on shapes, dtypes or settings other than the above.
      NotImplementedError: when the named implementation cannot serve the call.
    """
    operands = checked(blocks, indices, count=count, skipped=skipped)
    if programs is not None:
        validation.require_positive("programs", programs)
    if operands.listed == 0:
        return jnp.zeros((0, *blocks.shape[1:]), blocks.dtype)

    def run(name: str) -> Shaped[Array, " J *E"]:
        if name == "mosaic_gpu":
            from pallas_kernels.host_gather import pallas_mosaic_gpu as mosaic

            config = None if programs is None else mosaic.Config(programs=programs)
            return mosaic.host_gather_mosaic_gpu(operands, config=config)
        if name == "triton":
            from pallas_kernels.host_gather import pallas_triton as triton

            config = None if programs is None else triton.Config(programs=programs)
            return triton.host_gather_triton(operands, config=config)
        from pallas_kernels.host_gather.xla import host_gather_xla

        return host_gather_xla(operands)

    return dispatch(OP, implementation, run)
