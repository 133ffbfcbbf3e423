"""Fetch routes: how listed blocks come out of host memory.

One function, `fetch_blocks`, stands before all of them. A route moves the entries that
are not skipped and nothing else, so that bytes follow misses and not the budget:

  mosaic   a Pallas kernel that reads the pinned operand in place (Hopper and newer).
           A custom call, which stays out of CUDA graphs: with the fetch on its own
           stream it runs beside the graphs of the layer that computes
  triton   the same on Triton (compute capability 8.0 and newer). Captured into the
           compute's own graph it overlaps less
  slices   a loop of `dynamic_slice` and `device_put`, everywhere, CPUs included
  steps    no program of its own: one jitted call a layer, blocks gathered by NumPy and
           put on the device asynchronously (`inference.stepwise`): what anyone would
           write first, and the baseline

`auto` takes the fastest one that `routes.json` records for the device kind; a device
without a record gets `slices`, never an unrecorded kernel.

The order that makes a fetch overlap on a GPU is the caller's: join the fetch before and
start the next one behind one optimisation barrier a layer, and keep to the flags of
`sparda_jax.runtime`.
"""

import functools
import json
from importlib import resources
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Float, Int

from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.device import current_device_kind, require_cuda
from pallas_kernels.host_gather.api import host_gather
from sparda_jax.cache.memory import to_device
from sparda_jax.config import ConfigError, Route

FetchRoute = Literal["mosaic", "triton", "slices", "steps"]
_STREAM = "gpu_stream:1"


@functools.cache
def recorded_routes() -> dict[str, dict]:
    """Measured routes by device kind: `route` is the fastest one."""
    text = resources.files("sparda_jax.cache").joinpath("routes.json").read_text()
    return json.loads(text)["devices"]


def resolve_route(route: Route) -> FetchRoute:
    """The route that `route` stands for on the default device.

    Raises:
      ConfigError: If the route cannot run on this device; says why.
    """
    if route == "auto":
        kind = current_device_kind()
        record = recorded_routes().get(kind)
        return "slices" if record is None else record["route"]
    if route not in get_args(FetchRoute):
        raise ConfigError(
            f"CacheConfig.route={route!r} is not allowed: it must be 'auto' or one of "
            f"{get_args(FetchRoute)}"
        )
    least = {"mosaic": 9.0, "triton": 8.0}.get(route)
    if least is not None:
        try:
            require_cuda(route, least)
        except NotImplementedError as error:
            raise ConfigError(f"CacheConfig.route={route!r}: {error}") from error
    return route


def fetch_blocks(
    store: Float[Array, "R block 2 H"],
    rows: Int[Array, " J"],
    bound: Int[Array, ""],
    into: Float[Array, "J block 2 H"] | None,
    route: FetchRoute,
    *,
    aside: bool,
) -> Float[Array, "J block 2 H"]:
    """Starts the copy of the listed blocks to the device.

    Args:
      store: All blocks, in host memory.
      rows: Block of each entry, −1 for none.
      bound: Entries behind which all are −1; they are not looked at.
      into: Staging area to reuse (`slices`); its contents are lost.
      route: How; `steps` has no place inside a program.
      aside: Run beside the compute that follows, on a stream of its own (`mosaic`,
        `triton`).

    Returns:
      The staged blocks; a skipped entry's are undefined.
    """
    if route == "slices":
        assert into is not None
        return _fetch_slices(store, rows, into)
    if route == "steps":
        raise ConfigError("route 'steps' fetches outside of jitted programs")
    implementation = "mosaic_gpu" if route == "mosaic" else "triton"

    def gather(store: Array, rows: Array, bound: Array) -> Array:
        return host_gather(
            store,
            rows,
            count=bound,
            skipped="undefined",
            implementation=implementation,
        )

    if not aside:
        return gather(store, rows, bound)
    space = jax.memory.Space.Device
    beside: Any = compute_on(gather, compute_type=_STREAM, out_memory_spaces=space)
    return beside(store, rows, bound)


def _fetch_slices(
    store: Float[Array, "R block 2 H"],
    rows: Int[Array, " J"],
    into: Float[Array, "J block 2 H"],
) -> Float[Array, "J block 2 H"]:
    # A loop turn moves a block, so there must be none for an entry without one.
    wanted = rows >= 0
    entries = jnp.argsort(~wanted, stable=True)

    def body(turn: Array, staged: Array) -> Array:
        entry = entries[turn]
        block = to_device(lax.dynamic_slice_in_dim(store, rows[entry], 1, 0))
        return lax.dynamic_update_slice_in_dim(staged, block, entry, 0)

    return lax.fori_loop(0, jnp.sum(wanted, dtype=jnp.int32), body, into)


def commit_staged(
    slots: Float[Array, "R block 2 H"],
    staged: Float[Array, "J block 2 H"],
    where: Int[Array, " J"],
    bound: Int[Array, ""],
) -> Float[Array, "R block 2 H"]:
    """Puts staged blocks into their slots, in place; −1 skips one.

    Entries from `bound` on are all −1 and are not looked at.

    A fetch never writes to slots itself: the running layer may still read them, and
    XLA would then copy them all.
    """
    return commit_blocks(slots, staged, where, count=bound)
