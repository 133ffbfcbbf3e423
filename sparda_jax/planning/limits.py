"""Refuses a request that cannot fit, before anything is allocated for it."""

import dataclasses
import functools
import gc
import math
import os
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from sparda_jax.cache.memory import in_host_memory
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.inference.generate import GenerateState
from sparda_jax.inference.shapes import Shapes
from sparda_jax.machine import Limit, physical_memory, size_text
from sparda_jax.models.decoder import Storage
from sparda_jax.planning.memory import GIB, MemoryPlan, memory_plan
from sparda_jax.runtime import HOST_LIMIT

_MOST_SEQUENCES = 4096
_POOL_GIB = 64
# Of the pool of pinned memory: stores are of several arrays, which need not find room
# side by side in all of it (of 180 GiB a store of 168.6 and 10.5 did not).
_POOL_SHARE = 0.96


@dataclasses.dataclass(frozen=True)
class MemoryLimits:
    """What a request must fit in; None is not known.

    Attributes:
      device: For weights, cache and scratch.
      host: For the host store.
      both: For both together, where they are the same memory (a CPU).
    """

    device: Limit | None = None
    host: Limit | None = None
    both: Limit | None = None


def _pinned_pool() -> Limit:
    """The pool of pinned host memory that JAX makes for a GPU."""
    text = os.environ.get(HOST_LIMIT, "")
    size = int(text) if text.isdigit() else _POOL_GIB
    usable = round(_POOL_SHARE * size * GIB)
    return Limit(usable, f"{_POOL_SHARE:.0%} of {HOST_LIMIT}={text or _POOL_GIB}")


def _device_stats() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def device_bytes_in_use() -> int:
    """Bytes of the default device that arrays hold; 0 where it does not tell."""
    return int(_device_stats().get("bytes_in_use", 0))


def memory_limits(cache: CacheConfig) -> MemoryLimits:
    """The limits of a cache on the default device.

    `device_limit` and `host_limit` of the configuration come first. Else the device
    says what it has, and the host's share is JAX's pool of pinned memory or the
    machine's memory, whichever is smaller.
    """
    device = host = both = None
    stats = _device_stats()
    physical = physical_memory()
    if "bytes_limit" in stats:
        device = Limit(int(stats["bytes_limit"]), "the device's memory")
        pools = [_pinned_pool(), *([physical] if physical else [])]
        host = min(pools, key=lambda limit: limit.size)
    else:
        both = physical
    if cache.device_limit is not None:
        name = f"CacheConfig.device_limit={cache.device_limit}"
        device = Limit(cache.device_limit, name)
    if cache.host_limit is not None:
        host = Limit(cache.host_limit, f"CacheConfig.host_limit={cache.host_limit}")
    return MemoryLimits(device, host, both)


def _largest(plan: MemoryPlan, count: int = 4) -> str:
    parts = sorted(plan.parts(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts)


def shortfall(plan: MemoryPlan, limits: MemoryLimits) -> str | None:
    """Why a request does not fit, or None if it does."""
    request = f"batch {plan.batch} with room for {plan.capacity:,} tokens each"
    ways = ["fewer sequences at a time", "shorter prompts or fewer new tokens"]
    if plan.kind == "offload":
        ways.append("fewer CacheConfig.device_blocks")
    else:
        ways.append("CacheConfig(kind='offload')")
    host_store = f", host store {size_text(plan.host)}" if plan.host else ""
    needs = (
        ("device memory", plan.device, limits.device, _largest(plan), ways),
        (
            "host memory",
            plan.host,
            limits.host,
            "the host store of all KV blocks",
            [*ways[:2], "CacheConfig(kind='resident')"],
        ),
        (
            "memory",
            plan.device + plan.host,
            limits.both,
            _largest(plan) + host_store,
            ways[:2],
        ),
    )
    for what, need, limit, parts, ways in needs:
        if limit is not None and need > limit.size:
            return (
                f"{request} needs {size_text(need)} of {what}, and {limit} is the "
                f"limit; largest parts: {parts}. Ways out: {', '.join(ways)}"
            )
    return None


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, of those up to 4,096; 0 if none does.

    Args:
      fits: Whether a batch fits. Larger ones must not fit where smaller ones do not.
    """
    if not fits(1):
        return 0
    low = 1
    while low < _MOST_SEQUENCES and fits(min(2 * low, _MOST_SEQUENCES)):
        low = min(2 * low, _MOST_SEQUENCES)
    high = min(2 * low, _MOST_SEQUENCES + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@functools.lru_cache(256)
def _refusal(
    settings: LayerSettings,
    cache: CacheConfig,
    batch: int,
    shapes: Shapes,
    held_capacity: int | None,
    dtype: DTypeLike,
    storage: Storage,
    forecast: bool,
    limits: MemoryLimits,
) -> tuple[str | None, MemoryPlan]:
    def of(batch: int, shapes: Shapes = shapes) -> MemoryPlan:
        return memory_plan(
            settings,
            cache,
            batch=batch,
            shapes=shapes,
            dtype=dtype,
            storage=storage,
            forecast=forecast,
        )

    plan = of(batch)
    reason = shortfall(plan, limits)
    if reason is not None:
        most = largest_batch(lambda size: shortfall(of(size), limits) is None)
        reason += f" (of {plan.kind} sequences like these, {most or 'none'} fit)"
    if reason is None and held_capacity is not None:
        # A cache that grows is there twice for a moment.
        small = dataclasses.replace(shapes, capacity=held_capacity)
        held = of(batch, small)
        cached = held.persistent - held.weights - held.forecast_heads
        both = dataclasses.replace(
            plan,
            tile_scratch=max(
                plan.tile_scratch, cached - plan.kv_scratch - plan.prompt_states
            ),
            host=plan.host + held.host,
        )
        reason = shortfall(both, limits)
        if reason is not None:
            reason = f"while the conversation's cache grows, {reason}"
    return reason, plan


def refuse_what_cannot_fit(
    settings: LayerSettings,
    cache: CacheConfig,
    batch: int,
    shapes: Shapes,
    *,
    dtype: DTypeLike,
    storage: Storage,
    forecast: bool,
    held: GenerateState | None = None,
) -> None:
    """Raises before a request allocates, if it cannot fit.

    The plan and the limits are kept by shapes: a further call costs microseconds.

    Args:
      settings: How the request runs.
      cache: Where its KV lives, with its limits.
      batch: Sequences.
      shapes: Sizes of the request.
      dtype: Type of weights and cache.
      storage: How the layers are stored.
      forecast: Whether the model holds Forecast heads.
      held: State of the conversation that goes on.

    Raises:
      ConfigError: If device or host memory are too small; names need, limit, the
        largest parts and what to change.
    """
    limits = memory_limits(cache)
    capacity = None
    if held is not None and held.cache.capacity < shapes.capacity:
        capacity = held.cache.capacity
    reason, plan = _refusal(
        settings, cache, batch, shapes, capacity, dtype, storage, forecast, limits
    )
    if reason is not None:
        raise ConfigError(reason)
    if cache.device_limit is None and limits.device is not None:
        _refuse_beside_others(plan, limits.device, held=held is not None)


def why_not(
    settings: LayerSettings,
    cache: CacheConfig,
    batch: int,
    shapes: Shapes,
    *,
    dtype: DTypeLike,
    storage: Storage,
    forecast: bool,
) -> str | None:
    """Why a request does not fit, or None; arguments as `refuse_what_cannot_fit`."""
    limits = memory_limits(cache)
    return _refusal(
        settings, cache, batch, shapes, None, dtype, storage, forecast, limits
    )[0]


def _refuse_beside_others(plan: MemoryPlan, limit: Limit, *, held: bool) -> None:
    """Refuses what fits the device alone, but not beside the arrays on it."""
    ours = plan.weights + plan.forecast_heads
    if held:
        ours = plan.persistent

    def others() -> int:
        return max(0, device_bytes_in_use() - ours)

    if plan.device + others() <= limit.size:
        return
    gc.collect()  # an earlier cache may only wait for this
    if plan.device + others() > limit.size:
        raise ConfigError(
            f"batch {plan.batch} with room for {plan.capacity:,} tokens each needs "
            f"{size_text(plan.device)} of device memory beside {size_text(others())} "
            f"that other arrays hold, and {limit} is the limit; largest parts: "
            f"{_largest(plan)}. Ways out: drop earlier outputs (their conversation "
            "keeps its cache), fewer sequences at a time, CacheConfig(kind='offload')"
        )


def _own_bytes(x: jax.Array) -> int:
    """What one device holds of an array."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def refuse_copy(state: GenerateState, rows: int, cache: CacheConfig) -> None:
    """Raises before `rows` rows of a state are copied, if the copy cannot fit.

    Args:
      state: What a row of it takes, a row of the copy will.
      rows: Rows of the copy.
      cache: The limits.

    Raises:
      ConfigError: If device or host memory are too small for both.
    """
    limits = memory_limits(cache)
    leaves = jax.tree.leaves(state)
    held_host = sum(_own_bytes(leaf) for leaf in leaves if in_host_memory(leaf))
    held_device = sum(map(_own_bytes, leaves)) - held_host
    share = rows / state.lengths.shape[0]
    in_use = held_device
    if cache.device_limit is None and limits.device is not None:
        gc.collect()  # an earlier cache may only wait for this
        in_use = max(in_use, device_bytes_in_use())
    device, host = in_use + share * held_device, held_host * (1 + share)
    for what, need, limit in (
        ("device memory", device, limits.device),
        ("host memory", host, limits.host),
        ("memory", device + host, limits.both),
    ):
        if limit is not None and need > limit.size:
            raise ConfigError(
                f"a fork of {rows} rows needs {size_text(int(need))} of {what} with "
                f"what is there, and {limit} is the limit. Ways out: fewer rows, or "
                "drop earlier outputs (their conversation keeps its cache)"
            )
