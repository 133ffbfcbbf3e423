"""What becomes of a state when its call has ended, on one device or on a mesh.

On a mesh a larger cache and a copy are made by every device of its own part, as
`inference.next_turn` makes them of the whole: no KV leaves its device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, Shaped

from sparda_jax.cache.host_store import HostStore, copy_into
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.checks import ConfigError
from sparda_jax.config import CacheConfig
from sparda_jax.engine.on_mesh import StateLayout, empty_store, without_store
from sparda_jax.inference.generate import GenerateState
from sparda_jax.inference.next_turn import copy_state, next_turn
from sparda_jax.inference.shapes import Shapes


def next_state(
    state: GenerateState,
    shapes: Shapes,
    settings: LayerSettings,
    config: CacheConfig,
    layout: StateLayout | None,
) -> GenerateState:
    """The state with a larger cache if need be, and an empty output.

    Args:
      state: Where the turn before has ended.
      shapes, settings, config: Of the turn.
      layout: Of its state; None on one device.
    """
    if layout is None or state.cache.capacity >= shapes.capacity:
        return next_turn(state, shapes, settings, config)
    return _with_store(_grown(state, layout), state, layout)


def copied_state(
    state: GenerateState, layout: StateLayout | None, copies: int | None
) -> tuple[GenerateState, StateLayout | None]:
    """A state in buffers of its own, and its layout.

    Args:
      state: Where generation stands; it keeps its buffers.
      layout: Of its arrays; None on one device.
      copies: How often its first row is in the other; None for every row once.

    Raises:
      ConfigError: If devices would have to exchange rows.
    """
    if layout is None:
        return copy_state(state, _chosen(state, copies)), None
    if copies is not None:
        if layout.mesh.data > 1:
            raise ConfigError(
                f"rows={copies} is not allowed on a mesh of {layout.mesh.text}: its "
                "groups of devices do not exchange rows; use data=1, or begin with as "
                "many prompts"
            )
        layout = dataclasses.replace(layout, rows=copies)
    copy = _copied(state, layout, copies)
    return _with_store(copy, state, layout), layout


def _chosen(state: GenerateState, copies: int | None) -> list[int]:
    """Rows of a copy."""
    return list(range(state.lengths.shape[0])) if copies is None else [0] * copies


def _with_store(
    new: GenerateState, old: GenerateState, layout: StateLayout
) -> GenerateState:
    """The new state with a store of its own that holds the old one's blocks."""
    if not isinstance(new.cache, OffloadCache):
        return new
    assert isinstance(old.cache, OffloadCache)
    specs = layout.specs().cache
    assert isinstance(specs, OffloadCache)
    store, held = empty_store(layout), old.cache.store
    parts = tuple(
        _copied_part(part, blocks, layout.mesh.devices, spec)
        for part, blocks, spec in zip(
            store.parts, held.parts, specs.store.parts, strict=True
        )
    )
    store = dataclasses.replace(store, parts=parts)
    return new._replace(cache=new.cache._replace(store=store))


def _copied_part(
    new: Array, old: Array, mesh: Mesh, spec: PartitionSpec
) -> Shaped[Array, "..."]:
    """An array of a store with the blocks of another one, in all rows."""
    if old.shape[1] == new.shape[1]:
        return _copy_on_mesh(new, old, jnp.int32(0), mesh=mesh, spec=spec)
    for row in range(new.shape[1]):
        new = _copy_on_mesh(new, old, jnp.int32(row), mesh=mesh, spec=spec)
    return new


@functools.partial(jax.jit, static_argnames=("mesh", "spec"), donate_argnums=0)
def _copy_on_mesh(
    new: Shaped[Array, "..."],
    old: Shaped[Array, "..."],
    row: Int[Array, ""],
    *,
    mesh: Mesh,
    spec: PartitionSpec,
) -> Shaped[Array, "..."]:
    def local(new: Array, old: Array, row: Array) -> Array:
        return copy_into(new, old, to_row=row)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )(new, old, row)


@functools.partial(jax.jit, static_argnames="layout")
def _grown(state: GenerateState, layout: StateLayout) -> GenerateState:
    """The state of the layout's capacity; an offloaded one without its store."""

    def local(state: GenerateState) -> GenerateState:
        store = _held_store(state)
        shapes, settings = layout.shapes, layout.settings
        grown = next_turn(state, shapes, settings, layout.cache, store=store)
        return without_store(grown)

    # Of other sizes, of which the same axes are divided; staging buffers are made anew.
    specs = _without_staging(layout.specs())
    return _on_devices(local, _without_staging(state), specs, layout)


@functools.partial(jax.jit, static_argnames=("layout", "copies"))
def _copied(
    state: GenerateState, layout: StateLayout, copies: int | None
) -> GenerateState:
    """A copy of that layout; an offloaded one without its store."""

    def local(state: GenerateState) -> GenerateState:
        rows = _chosen(state, copies)
        return without_store(copy_state(state, rows, store=_held_store(state)))

    return _on_devices(local, state, layout.specs(), layout)


def _without_staging(state: GenerateState) -> GenerateState:
    if not isinstance(state.cache, OffloadCache):
        return state
    return state._replace(cache=state.cache._replace(staging=()))


def _held_store(state: GenerateState) -> HostStore | None:
    """The store of a device's part, in the place of the one that is made later."""
    return state.cache.store if isinstance(state.cache, OffloadCache) else None


def _on_devices(
    local: Callable[[GenerateState], GenerateState],
    state: GenerateState,
    specs: GenerateState,
    layout: StateLayout,
) -> GenerateState:
    """What every device makes of its part of a state, without a store."""
    return jax.shard_map(
        local,
        mesh=layout.mesh.devices,
        in_specs=(specs,),
        out_specs=without_store(layout.specs()),
        check_vma=False,
    )(state)
