"""What a batch takes, asked for once, and the caches that decide whether it fits."""

import dataclasses
import functools

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig
from sparda_jax.inference.shapes import Shapes
from sparda_jax.planning.limits import MemoryLimits
from sparda_jax.planning.memory import MemoryPlan
from sparda_jax.planning.slots import fill_slots


@functools.lru_cache(4096)
def batch_memory(
    settings: LayerSettings,
    cache: CacheConfig,
    limits: MemoryLimits,
    batch: int,
    shapes: Shapes,
    dtype: str,
) -> tuple[CacheConfig, MemoryPlan]:
    """`fill_slots`, once for all shares of misses, on which it does not depend."""
    return fill_slots(
        settings,
        cache,
        limits,
        batch=batch,
        shapes=shapes,
        dtype=dtype,
        storage="per_layer",
    )


def fewest_slots(cache: CacheConfig) -> list[CacheConfig]:
    """The configurations of fewest slots: where none of them fits, nothing does."""
    if cache.device_blocks == "auto":
        cache = dataclasses.replace(cache, device_blocks=None)
    if cache.layer0 != "auto":
        return [cache]
    places = ("resident", "offload")
    return [dataclasses.replace(cache, layer0=place) for place in places]
