"""Host and device memory. The only file of the package that names memory kinds.

Whether an array lives in host memory is part of its type inside `jit`
(``float32<host>[…]``), so that the fetch routes and the linter can tell. On a CPU the
compiler drops the annotation: both kinds are the same memory there, and everything that
works on a GPU works on a CPU. The other way round is not true, hence `cache.lint`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from sparda_jax.checks import ConfigError

HOST_KIND = "pinned_host"


def to_host(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Moves an array to host memory, inside or outside of `jit`."""
    return jax.device_put(x, jax.memory.Space.Host)


def to_device(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Moves an array to device memory, inside or outside of `jit`."""
    return jax.device_put(x, jax.memory.Space.Device)


def in_host_memory(x: Array | jax.core.AbstractValue) -> bool:
    """Whether the type of `x` says that it lives in host memory."""
    aval = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def host_sharding() -> SingleDeviceSharding:
    """Where host arrays are put: pinned memory that the default device can read.

    Raises:
      ConfigError: If the device has no such memory kind.
    """
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_KIND not in kinds:
        raise ConfigError(
            f"CacheConfig.kind='offload' needs the memory kind {HOST_KIND!r}: device "
            f"{device.device_kind!r} has {', '.join(kinds) or 'none'}"
        )
    return SingleDeviceSharding(device, memory_kind=HOST_KIND)


def host_zeros(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
) -> Shaped[Array, "..."]:
    """Zeros in host memory, without a copy of them in device memory.

    Args:
      shape: Of the array.
      dtype: Its type.
      mesh: Devices that divide it, each with its part in the memory that it can read;
        None for the default device.
      spec: How they do.

    Raises:
      ConfigError: If the device has no host memory kind.
    """
    # NumPy's zeros are untouched pages, so that only the pinned array takes memory.
    if mesh is None:
        return jax.device_put(np.zeros(shape, jnp.dtype(dtype)), host_sharding())
    sharding = _divided(mesh, spec)
    # Zeros of a part's own: a part of the whole's would first be copied together.
    part = np.zeros(sharding.shard_shape(shape), jnp.dtype(dtype))
    return jax.make_array_from_callback(shape, sharding, lambda _: part)


def host_shape(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
) -> jax.ShapeDtypeStruct:
    """The type of a host array, to lower programs without allocating it.

    Args:
      shape, dtype, mesh, spec: As of `host_zeros`.
    """
    if mesh is None:
        # Of a shape without values, only a named sharding makes the space part of the
        # type.
        device = tuple(host_sharding().device_set)
        mesh = jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=device)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_divided(mesh, spec))


def _divided(mesh: Mesh, spec: PartitionSpec | None) -> NamedSharding:
    return NamedSharding(mesh, spec or PartitionSpec(), memory_kind=HOST_KIND)
