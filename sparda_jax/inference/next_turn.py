"""What becomes of a state when its call has ended: the next turn's, or copies."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparda_jax.cache.counters import BlockCounts, FetchTotals
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadCache, grow_offload
from sparda_jax.cache.resident import grow
from sparda_jax.cache.rows import copy_rows
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig
from sparda_jax.inference.generate import (
    WITHOUT_ROWS,
    GenerateState,
    list_width,
    staging_areas,
)
from sparda_jax.inference.shapes import Shapes


def next_turn(
    state: GenerateState,
    shapes: Shapes,
    settings: LayerSettings,
    config: CacheConfig,
    *,
    store: HostStore | None = None,
) -> GenerateState:
    """The state with a larger cache if need be, and an empty output.

    Args:
      state: Where the turn before has ended.
      shapes, settings, config: Of the turn.
      store: Of an offloaded cache that grows; None to make it here.
    """
    cache = state.cache
    if cache.capacity < shapes.capacity:
        if isinstance(cache, OffloadCache):
            assert settings.offload is not None
            width = list_width(shapes, settings)
            cache = grow_offload(
                cache,
                shapes.capacity,
                settings.sparse,
                config,
                settings.indices,
                width=width,
                staging=staging_areas(settings.offload, config),
                store=store,
            )
        else:
            cache = grow(cache, shapes.capacity, settings.sparse, settings.indices)
    batch = cache.batch
    return state._replace(
        cache=cache,
        tokens=jnp.full((batch, shapes.new), -1, jnp.int32),
        generated=jnp.zeros((batch,), jnp.int32),
        prefill_counts=BlockCounts.zero(),
        decode_counts=BlockCounts.zero(),
        fetches=FetchTotals.zero(settings.config.num_layers),
    )


def copy_state(
    state: GenerateState, rows: Sequence[int], *, store: HostStore | None = None
) -> GenerateState:
    """A state of some of the rows, in buffers of its own.

    Args:
      state: Where generation stands; it keeps its buffers.
      rows: Which of its rows; one may be copied several times.
      store: Of a copy of an offloaded cache; None to make it here.
    """
    chosen = jnp.asarray(rows)
    copies: dict[str, Any] = {"cache": copy_rows(state.cache, rows, store=store)}
    for name in WITHOUT_ROWS:
        copies[name] = jax.tree.map(jnp.copy, getattr(state, name))
    for name in set(GenerateState._fields) - set(copies):
        copies[name] = jax.tree.map(
            lambda x: jnp.take(x, chosen, axis=0), getattr(state, name)
        )
    return GenerateState(**copies)
