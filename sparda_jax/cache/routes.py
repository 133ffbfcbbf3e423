"""Fetch routes: how listed blocks come out of host memory.

A route is an object with a name. It moves the entries that are not skipped and nothing
else, so that bytes follow misses and not the budget:

  mosaic         a Pallas kernel that reads the pinned operand in place (Hopper and
                 newer). A custom call, which stays out of CUDA graphs: with the fetch
                 on its own stream it runs beside the graphs of the layer that computes
  triton         the same on Triton (compute capability 8.0 and newer). Captured into
                 the compute's own graph it overlaps less
  dynamic_slice  a loop of `dynamic_slice` and `device_put`, everywhere, CPUs included
  host_loop      no program of its own: one jitted call a layer, blocks gathered by
                 NumPy and put on the device asynchronously (`inference.host_loop`):
                 what anyone would write first, and the baseline

`auto` takes the fastest one that `routes.json` records for the device kind; a device
without a record gets `dynamic_slice`, never an unrecorded kernel.

The order that makes a fetch overlap on a GPU is the caller's: join the fetch before and
start the next one behind one optimisation barrier a layer, and keep to the flags of
`sparda_jax.runtime`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Int, Shaped

from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.device import current_device_kind, require_cuda
from pallas_kernels.dispatch import Implementation
from pallas_kernels.host_gather.api import host_gather
from sparda_jax.cache.memory import to_device
from sparda_jax.checks import ConfigError

_STREAM = "gpu_stream:1"
# XLA gives the sums of a program over devices to its first four streams, round-robin.
# One on the fetch's stream waits for the fetch, and every device for that sum.
_STREAM_BESIDE_SUMS = "gpu_stream:7"


@dataclasses.dataclass(frozen=True)
class FetchRoute:
    """One way to fetch. A frozen value, so that it can be static in a jitted call.

    Attributes:
      name: As users write it.
      overlaps: A look-ahead fetch runs on a stream of its own, beside compute.
      in_program: Fetches are part of a jitted program; else they are made between
        calls, a call a layer.
      reuses_staging: Fetches write to staging areas that the cache keeps; else each
        fetch brings its own.
      writes: `write` puts blocks into host memory; else the store is updated by slices.
    """

    name: str
    overlaps: bool = False
    in_program: bool = True
    reuses_staging: bool = False
    writes: bool = False

    def check(self) -> None:
        """Raises ConfigError if the route cannot run on the default device."""

    def beside_sums(self) -> "FetchRoute":
        """The route for a program that sums over devices."""
        return self

    def staging_areas(self, at_once: int) -> int:
        """Staging areas that the cache keeps for so many fetches in flight."""
        return at_once if self.reuses_staging else 0

    def fetch(
        self,
        store: Shaped[Array, "R *block"],
        host_blocks: Int[Array, " J"],
        num_entries: Int[Array, ""],
        into: Shaped[Array, "J *block"] | None,
        *,
        on_side_stream: bool,
    ) -> Shaped[Array, "J *block"]:
        """Starts the copy of the listed blocks to the device, inside of `jit`.

        Args:
          store: All blocks, in host memory.
          host_blocks: Block of each entry, −1 for none.
          num_entries: Entries behind which all are −1; they are not looked at.
          into: Staging area to reuse, where the route does; its contents are lost.
          on_side_stream: Run beside the compute that follows, where the route can.

        Returns:
          The staged blocks; a skipped entry's are undefined.

        Raises:
          ConfigError: If the route has no place inside a program.
        """
        return self._fetch(store, host_blocks, num_entries, into, on_side_stream)

    def _fetch(self, store, host_blocks, num_entries, into, on_side_stream) -> Array:
        """What a route does for `fetch`, with its arguments."""
        raise NotImplementedError

    def write(
        self,
        store: Shaped[Array, "R *block"],
        blocks: Shaped[Array, "J *block"],
        places: Int[Array, " J"],
    ) -> Shaped[Array, "R *block"]:
        """Puts blocks into host memory, in place, inside of `jit`.

        Args:
          store: All blocks, in host memory.
          blocks: Those to write, on the device.
          places: Where each goes, no place twice; −1 for a block that stays out.
        """
        return self._write(store, blocks, places)

    def _write(self, store, blocks, places) -> Array:
        """What a route does for `write`, with its arguments."""
        raise NotImplementedError

    def repeatable(
        self, store: Shaped[Array, "R *block"], host_blocks: Int[np.ndarray, " J"]
    ) -> Callable[[], object]:
        """A call that fetches these blocks, to be timed for itself."""
        listed = jnp.asarray(host_blocks, jnp.int32)
        count = jnp.int32(listed.shape[0])
        shape = (listed.shape[0], *store.shape[1:])
        into = jnp.zeros(shape, store.dtype) if self.reuses_staging else None
        call = jax.jit(functools.partial(self.fetch, on_side_stream=False))
        return lambda: call(store, listed, count, into)


@dataclasses.dataclass(frozen=True)
class KernelRoute(FetchRoute):
    """A kernel that reads pinned memory in place.

    Attributes:
      implementation: Of `host_gather`.
      least_capability: Compute capability that it needs.
      programs: Thread blocks that read; None takes what is recorded.
      stream: What a look-ahead fetch runs on.
    """

    overlaps: bool = True
    implementation: Implementation = "mosaic_gpu"
    least_capability: float = 9.0
    programs: int | None = None
    stream: str = _STREAM

    def beside_sums(self) -> FetchRoute:
        """The route with a stream that no sum is given.

        Two H100 (JAX 0.11.2, docs/log-gpu.md): a step of 10.7 ms in place of 12.8.
        """
        return dataclasses.replace(self, stream=_STREAM_BESIDE_SUMS)

    def check(self) -> None:
        """Raises ConfigError if there is no such device."""
        try:
            require_cuda(self.name, self.least_capability)
        except NotImplementedError as error:
            raise ConfigError(f"CacheConfig.route={self.name!r}: {error}") from error

    def _fetch(self, store, host_blocks, num_entries, into, on_side_stream) -> Array:
        del into

        def gather(store: Array, host_blocks: Array, num_entries: Array) -> Array:
            return host_gather(
                store,
                host_blocks,
                count=num_entries,
                skipped="undefined",
                programs=self.programs,
                implementation=self.implementation,
            )

        if not on_side_stream:
            return gather(store, host_blocks, num_entries)
        space = jax.memory.Space.Device
        beside: Any = compute_on(
            gather, compute_type=self.stream, out_memory_spaces=space
        )
        return beside(store, host_blocks, num_entries)

    def _write(self, store, blocks, places) -> Array:
        """By the Triton kernel that commits blocks to slots.

        One H100 (JAX 0.11.2): 134 MB of a layer in 2.6 ms, 52 GB/s (`benchmarks.prefill
        --cache offload --parts`); update-slices, 9 to 13 GB/s.
        """

        def put(store: Array, blocks: Array, places: Array) -> Array:
            return commit_blocks(store, blocks, places, implementation="triton")

        # A kernel's result has a type in device memory, unless this says otherwise.
        space = jax.memory.Space.Host
        beside: Any = compute_on(put, compute_type=_STREAM, out_memory_spaces=space)
        return beside(store, blocks, places)


@dataclasses.dataclass(frozen=True)
class DynamicSliceRoute(FetchRoute):
    """A loop that slices one block at a time and moves it."""

    reuses_staging: bool = True

    def _fetch(self, store, host_blocks, num_entries, into, on_side_stream) -> Array:
        del num_entries, on_side_stream
        assert into is not None
        # Every pass of the loop moves a block, so there must be none for an entry
        # without one.
        listed = host_blocks >= 0
        entries = jnp.argsort(~listed, stable=True)

        def body(number: Array, staged: Array) -> Array:
            entry = entries[number]
            block = lax.dynamic_slice_in_dim(store, host_blocks[entry], 1, 0)
            return lax.dynamic_update_slice_in_dim(staged, to_device(block), entry, 0)

        return lax.fori_loop(0, jnp.sum(listed, dtype=jnp.int32), body, into)


@dataclasses.dataclass(frozen=True)
class HostLoopRoute(FetchRoute):
    """NumPy gathers between the calls of a loop on the host."""

    in_program: bool = False

    def _fetch(self, store, host_blocks, num_entries, into, on_side_stream) -> Array:
        """Raises ConfigError: there is no program to fetch in."""
        del store, host_blocks, num_entries, into, on_side_stream
        raise ConfigError(f"route {self.name!r} fetches outside of jitted programs")

    def repeatable(
        self, store: Shaped[Array, "R *block"], host_blocks: Int[np.ndarray, " J"]
    ) -> Callable[[], object]:
        """As `FetchRoute.repeatable`."""
        held = np.asarray(store)
        return lambda: jax.device_put(held[host_blocks])


_ROUTES = (
    KernelRoute("mosaic", writes=True),
    KernelRoute("triton", implementation="triton", least_capability=8.0),
    DynamicSliceRoute("dynamic_slice"),
    HostLoopRoute("host_loop"),
)


@functools.cache
def recorded_routes() -> dict[str, dict]:
    """Measured routes by device kind: `route` is the fastest one."""
    text = resources.files("sparda_jax.cache").joinpath("routes.json").read_text()
    return json.loads(text)["devices"]


def route_names() -> tuple[str, ...]:
    """The names of all routes."""
    return tuple(route.name for route in _ROUTES)


def named_route(name: str) -> FetchRoute:
    """The route of that name, whether it can run here or not.

    Raises:
      ConfigError: If there is none.
    """
    for route in _ROUTES:
        if route.name == name:
            return route
    raise ConfigError(
        f"CacheConfig.route={name!r} is not allowed: it must be 'auto' or one of "
        f"{route_names()}"
    )


def resolve_route(name: str) -> FetchRoute:
    """The route that a name stands for on the default device.

    Raises:
      ConfigError: If there is none, or it cannot run on this device; says why.
    """
    if name == "auto":
        record = recorded_routes().get(current_device_kind(), {})
        return named_route(record.get("route", "dynamic_slice"))
    route = named_route(name)
    route.check()
    return route
