"""Measures what the planner needs to know of a machine: link, device memory, products.

Every figure is the median of a few calls after a warm-up, with its spread; each call
moves enough for its start not to matter. On a CPU host and device are the same memory,
and the link is a copy within it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.device import current_device_kind
from sparda_jax.cache.memory import host_sharding, to_device
from sparda_jax.cache.routes import FetchRoute, resolve_route
from sparda_jax.checks import (
    LARGEST_BYTES,
    ConfigError,
    float_dtype,
    integer,
    optional,
)
from sparda_jax.config import Route, route_name
from sparda_jax.machine import physical_memory, size_text
from sparda_jax.planning.rates import Rates, recorded_costs

_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Measured:
    """A rate, and half its interquartile range over the median."""

    rate: float
    spread: float


@dataclasses.dataclass(frozen=True)
class MachineRates:
    """What was measured here.

    Attributes:
      device, jax: Device kind and JAX version.
      link: Bytes a second of one large copy, pinned host to device.
      fetch: Bytes a second of listed blocks through the fetch route.
      memory: Bytes a second of a device copy, reads and writes counted.
      products: FLOP/s of a large matrix product.
      route: The fetch route.
      block_bytes: Size of a fetched block.
    """

    device: str
    jax: str
    link: Measured
    fetch: Measured
    memory: Measured
    products: Measured
    route: str
    block_bytes: int

    @property
    def rates(self) -> Rates:
        """As the planner takes them."""
        return Rates(
            memory=self.memory.rate,
            fetch=self.fetch.rate,
            link=self.link.rate,
            peak=self.products.rate,
            **recorded_costs(self.device),
            route=self.route,
            source=f"measured on {self.device}, JAX {self.jax}",
        )


def _timed(call: Callable[[], object], work: int) -> Measured:
    """`work` a second over the calls of `call`."""
    seconds = []
    for _ in range(_REPEATS + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    low, median, high = statistics.quantiles(seconds[1:], n=4)
    return Measured(work / median, (high - low) / 2 / median)


def _block_bytes(block_size: int, head_dim: int, dtype: DTypeLike) -> int:
    return block_size * 2 * head_dim * jnp.dtype(dtype).itemsize


def _refuse_more_than_memory(size: int) -> None:
    """Raises where the store and its copy would take more than half the memory."""
    memory = physical_memory()
    if memory is not None and 2 * size > memory.size // 2:
        raise ConfigError(
            f"measuring with {size_text(size)} of blocks takes {size_text(2 * size)}: "
            f"it must be at most half of {memory}; give fewer store_bytes or a smaller "
            "block_size"
        )


def _pinned_store(
    block_size: int, head_dim: int, dtype: DTypeLike, size: int
) -> Float[Array, "R block 2 H"]:
    shape = (block_size, 2, head_dim)
    rows = max(2, size // _block_bytes(block_size, head_dim, dtype))
    return jax.device_put(np.ones((rows, *shape), jnp.dtype(dtype)), host_sharding())


def _store_bytes() -> int:
    return 2**26 if jax.default_backend() == "cpu" else 2**30


def _measure_fetch(store: Float[Array, "R block 2 H"], route: FetchRoute) -> Measured:
    """Bytes a second of a quarter of the store's blocks, in random order."""
    rows = store.shape[0]
    listed = max(1, rows // 4)
    chosen = np.random.default_rng(0).choice(rows, listed, replace=False)
    return _timed(route.repeatable(store, chosen), listed * store.nbytes // rows)


def measure_fetch(
    route: FetchRoute, *, block_size: int, head_dim: int, dtype: DTypeLike
) -> Measured:
    """Measures how fast listed blocks come to the device.

    Args:
      route: How blocks are fetched.
      block_size: Tokens of a block.
      head_dim: H; a block is [block_size, 2, H].
      dtype: Its type.

    Raises:
      ConfigError: If there is no host memory kind.
    """
    store = _pinned_store(block_size, head_dim, dtype, _store_bytes())
    return _measure_fetch(store, route)


def measure_rates(
    *,
    block_size: int = 64,
    head_dim: int = 128,
    dtype: DTypeLike = jnp.bfloat16,
    route: Route = "auto",
    store_bytes: int | None = None,
) -> MachineRates:
    """Measures this machine. Takes a few seconds.

    Args:
      block_size: Tokens of a block.
      head_dim: H; a fetched block is [block_size, 2, H].
      dtype: Its type.
      route: How blocks are fetched.
      store_bytes: Pinned memory to fetch from; None is 1 GiB, 64 MiB on a CPU. A
        copy takes as much device memory.

    Raises:
      ConfigError: If an argument is not allowed or asks for more than half of the
        memory, the route cannot run here, or there is no host memory kind.
    """
    block_size = integer(1, 2**16)("block_size", block_size)
    head_dim = integer(1, 2**16)("head_dim", head_dim)
    dtype = float_dtype("dtype", dtype)
    size = optional(integer(1, LARGEST_BYTES))("store_bytes", store_bytes)
    size = size or _store_bytes()
    _refuse_more_than_memory(max(size, 2 * _block_bytes(block_size, head_dim, dtype)))
    chosen = resolve_route(route_name("route", route))
    cpu = jax.default_backend() == "cpu"
    store = _pinned_store(block_size, head_dim, dtype, size)
    link = _timed(lambda: to_device(store), store.nbytes)
    fetched = _measure_fetch(store, chosen)

    # A negation reads and writes every byte; an identity would be left out. Several in
    # one call: the start of a call would count beside a single one.
    values, passes = jnp.ones((size // 4,), jnp.float32), 1 if cpu else 16
    negate = jax.jit(lambda x: lax.fori_loop(0, passes, lambda _, y: -y, x))
    copy = _timed(lambda: negate(values), 2 * values.nbytes * passes)

    width = 1024 if cpu else 8192
    square = jnp.ones((width, width), jnp.float32 if cpu else jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    products = _timed(lambda: multiply(square, square), 2 * width**3)
    return MachineRates(
        device=current_device_kind(),
        jax=jax.__version__,
        link=link,
        fetch=fetched,
        memory=copy,
        products=products,
        route=chosen.name,
        block_bytes=store.nbytes // store.shape[0],
    )
