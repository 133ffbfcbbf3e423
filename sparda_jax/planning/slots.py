"""`device_blocks="auto"`: as many slots as the device has room for."""

import dataclasses
import functools
import gc
from collections.abc import Callable

from jax.typing import DTypeLike

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.decoder import Storage
from sparda_jax.planning.limits import (
    MemoryLimits,
    device_bytes_in_use,
    shortfall,
)
from sparda_jax.planning.memory import MemoryPlan, memory_plan

# Of the device's memory: scratch is estimated, and an allocator leaves gaps.
_SPARE = 0.05
# C is a block list's length, all blocks, or one of the sizes between that are each so
# many times the one before: requests of nearly the same size share a program, and where
# little is left, a little more than a list is not lost to a coarse step.
_GROWTH = 1.25
# Lists that the slots hold where layer 0's misses, which nothing hides, are few enough
# for its KV to give way to more slots.
_LARGE = 2


def fill_slots(
    settings: LayerSettings,
    cache: CacheConfig,
    limits: MemoryLimits,
    *,
    batch: int,
    shapes: Shapes,
    dtype: DTypeLike,
    storage: Storage,
    forecast: bool | None = None,
    others: int = 0,
) -> tuple[CacheConfig, MemoryPlan]:
    """The configuration with `device_blocks="auto"` decided, and its plan.

    C is all blocks if they fit: then nothing is ever fetched. Else it is the largest of
    a row of sizes, each a quarter more than the one before, that fits. The first is the
    block list's length, which is taken where the request itself hardly fits.
    `layer0="auto"` is decided with it: where not all blocks fit, its KV gives way to
    more slots if there are two lists of them then, or if it must. It gives way to as
    many slots as were asked for as well, where the request fits only so.

    Args:
      settings: How the request runs.
      cache: Where its KV lives.
      limits: What it must fit in; without any all blocks are taken.
      batch: Sequences.
      shapes: Sizes of the request.
      dtype: Type of weights and cache.
      storage: How the layers are stored.
      forecast: Whether the model holds Forecast heads; None: where they are needed.
      others: Bytes of the device that other arrays hold.
    """
    plan = functools.partial(
        memory_plan,
        settings,
        batch=batch,
        shapes=shapes,
        dtype=dtype,
        storage=storage,
        forecast=forecast,
    )
    if settings.offload is None:
        return cache, plan(cache)
    if cache.device_blocks != "auto":
        memory = plan(cache)
        if cache.layer0 == "auto" and shortfall(memory, limits) is not None:
            far = dataclasses.replace(cache, layer0="offload")
            if shortfall(more := plan(far), limits) is None:
                return far, more
        return cache, memory
    blocks = shapes.capacity // settings.sparse.block_size
    least = min(settings.selector.list_width(blocks, settings.sparse), blocks)

    def filled(cache: CacheConfig) -> tuple[CacheConfig, MemoryPlan]:
        return _fill(cache, plan, limits, others, least, blocks)

    if cache.layer0 != "auto":
        return filled(cache)
    near, memory = filled(dataclasses.replace(cache, layer0="resident"))
    short = shortfall(memory, limits) is not None
    if short or near.slots(blocks, least) < blocks:
        far, more = filled(dataclasses.replace(cache, layer0="offload"))
        worth = short or far.slots(blocks, least) >= _LARGE * least
        if worth and shortfall(more, limits) is None:
            return far, more
    return near, memory


def _fill(
    cache: CacheConfig,
    plan: Callable[[CacheConfig], MemoryPlan],
    limits: MemoryLimits,
    others: int,
    least: int,
    blocks: int,
) -> tuple[CacheConfig, MemoryPlan]:
    """As many slots as fit, of `least` to `blocks`."""

    def of(slots: int) -> CacheConfig:
        return dataclasses.replace(cache, device_blocks=slots)

    one = plan(of(least))
    if blocks == least:
        return of(least), one
    # Every slot takes the same, and up to the last but one nothing else depends on how
    # many there are.
    two = plan(of(least + 1))
    kv, table = two.slots - one.slots, two.slot_tables - one.slot_tables
    more, free = blocks - least, _free(one, limits, others)
    if free is not None and free < (kv + table) * more:
        more = _size(least, least + max(0, free) // (kv + table)) - least
    if least + more == blocks:
        # Nothing is ever fetched then, and no room is needed for what is staged.
        return of(blocks), plan(of(blocks))
    filled = dataclasses.replace(
        one,
        slots=one.slots + more * kv,
        slot_tables=one.slot_tables + more * table,
    )
    return of(least + more), filled


def _size(least: int, most: int) -> int:
    """The largest size of the row that begins with `least` and is at most `most`."""
    size = least
    while (larger := max(size + 1, int(size * _GROWTH))) <= most:
        size = larger
    return size


def _free(plan: MemoryPlan, limits: MemoryLimits, others: int) -> int | None:
    """Bytes that slots can take beside a plan; None if there is no limit."""
    left = []
    if limits.device is not None:
        left.append((limits.device.size, plan.device + others))
    if limits.both is not None:
        left.append((limits.both.size, plan.device + plan.host))
    if not left:
        return None
    return min(round((1 - _SPARE) * size) - needed for size, needed in left)


def held_by_others(ours: int) -> int:
    """Bytes of the default device that arrays beside ours hold."""
    gc.collect()  # an earlier cache may only wait for this
    return max(0, device_bytes_in_use() - ours)
