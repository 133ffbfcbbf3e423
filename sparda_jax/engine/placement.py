"""Where and in which sizes a request runs: settled before anything is allocated."""

import dataclasses
import functools

import jax

from sparda_jax.cache.evict import kept_blocks
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.routes import FetchRoute, named_route
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.checks import require
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.on_mesh import StateLayout
from sparda_jax.inference.generate import GenerateState
from sparda_jax.inference.shapes import Shapes, plan_shapes, shared_rows, shared_shapes
from sparda_jax.mesh import MeshConfig
from sparda_jax.planning.auto import offload_settings
from sparda_jax.planning.limits import (
    memory_limits,
    refuse_what_cannot_fit,
    why_not,
)
from sparda_jax.planning.memory import tree_bytes
from sparda_jax.planning.slots import fill_slots, held_by_others

# What of a cache's configuration only an offloaded cache has use for.
_OFFLOAD_ONLY = (
    "device_blocks",
    "prefetch",
    "layers_ahead",
    "layer0",
    "route",
    "codec",
    "recall_every",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a request is.

    Attributes:
      batch: Sequences.
      chunk: Tokens of the longest row in one prefill call.
      farthest_start: Largest position at which a row's prefill call starts.
      longest: Tokens of the longest row, prompt and cache together.
      max_new: Output tokens.
    """

    batch: int
    chunk: int
    farthest_start: int
    longest: int
    max_new: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a request runs.

    Attributes:
      rows: Rows of all arrays: the request's sequences, then padding.
      shapes: Sizes of its programs.
      cache: Where the KV lives, `kind="auto"` decided.
      settings: The model and how to attend.
      notes: What was decided, and which arguments have no effect here.
    """

    rows: int
    shapes: Shapes
    cache: CacheConfig
    settings: LayerSettings
    notes: tuple[str, ...]


def place(
    lm: LanguageModel,
    sizes: Sizes,
    conversation: Conversation | None,
    *,
    by_row: bool | None = None,
) -> Placement:
    """Decides how a request runs.

    Args:
      lm: The model.
      sizes: The request's.
      conversation: The one that goes on, or None.
      by_row: Whether rows are prefilled one after another; None where that is as fast
        (`Shapes.by_row`). With True no size is shared with other requests.

    Raises:
      ConfigError: If the attention or the device cannot do what the cache's
        configuration asks for, or the request cannot fit.
    """
    _check_processes(lm)
    state = None if conversation is None else conversation.state
    groups = 1 if lm.mesh is None else lm.mesh.data
    if groups > 1:
        # A program of one row would leave all other groups of devices idle.
        by_row = False
    close = plan_shapes(**_tokens(lm, sizes), batch=sizes.batch, by_row=by_row)
    close = _at_least(state, close)
    _check_cache(lm, close)
    rows = sizes.batch if state is None else state.lengths.shape[0]
    rows = -(-rows // groups) * groups
    cache, reason = _decide_kind(lm, rows // groups, close, state)
    notes = [] if reason is None else [reason]
    notes += _without_effect(lm, cache)
    settings = _settings(lm, cache)
    if cache.kind == "evict":
        notes += _evicts(settings, close)
    if lm.mesh is not None:
        refuse_on_mesh(settings)
    decided, reason = _decide_slots(lm, cache, settings, rows // groups, close, state)
    notes += [] if reason is None else [reason]
    refuse = functools.partial(
        refuse_what_cannot_fit,
        settings,
        # With the least of slots, the largest batch that fits can be said.
        dataclasses.replace(cache, layer0=decided.layer0),
        **_weights(lm),
        held=state,
    )
    shares = cache.kind == "resident" and not by_row
    shared = _shared(lm, sizes, state) if shares else None
    if shared is not None and shared[0] % groups:
        shared = None
    if shared is not None:
        try:
            refuse(shared[0] // groups, shared[1])
        except ConfigError:
            shared = None  # what is rounded up is too much: the close sizes may fit
    if shared is None:
        refuse(rows // groups, close)
        shared = rows, close
    return Placement(*shared, decided, settings, tuple(notes))


def state_layout(
    lm: LanguageModel, placement: Placement, top_logprobs: int | None
) -> StateLayout | None:
    """The layout of a session's state; None for a model on one device."""
    if lm.mesh is None:
        return None
    return StateLayout(
        config=lm.config,
        settings=placement.settings,
        mesh=lm.mesh,
        rows=placement.rows,
        shapes=placement.shapes,
        cache=placement.cache,
        dtype=lm.model.embedding[...].dtype,
        storage=lm.model.storage,
        top_logprobs=top_logprobs,
    )


def _tokens(lm: LanguageModel, sizes: Sizes) -> dict[str, int]:
    return {
        "prompt": sizes.chunk,
        "farthest_start": sizes.farthest_start,
        "longest": sizes.longest,
        "max_new": sizes.max_new,
        "tile_size": lm.tile_size,
        "block_size": lm.sparse.block_size,
    }


def _weights(lm: LanguageModel) -> dict:
    model = lm.model
    return {
        "dtype": model.embedding[...].dtype,
        "storage": model.storage,
        "forecast": model.forecast is not None,
    }


def _at_least(state: GenerateState | None, shapes: Shapes) -> Shapes:
    """The shapes with room for what a conversation's cache has room for."""
    if state is None:
        return shapes
    capacity = max(shapes.capacity, state.cache.capacity)
    return dataclasses.replace(shapes, capacity=capacity)


def _shared(
    lm: LanguageModel, sizes: Sizes, state: GenerateState | None
) -> tuple[int, Shapes] | None:
    """Rows and shapes that the request shares with other small ones, or None."""
    # A tile of the literal reference is as wide as the array, padding included.
    if not lm.sparse.mask_future_blocks:
        return None
    rows = shared_rows(sizes.batch) if state is None else state.lengths.shape[0]
    if rows is None or shared_rows(rows) is None:
        return None
    shapes = shared_shapes(rows, **_tokens(lm, sizes))
    return None if shapes is None else (rows, _at_least(state, shapes))


def _settings(lm: LanguageModel, cache: CacheConfig) -> LayerSettings:
    selector = lm.selector
    if cache.kind == "resident" and cache.exactness == "verify":
        # Nothing is prefetched that could be verified: the own queries choose.
        selector = selector.by_own_query()
    return dataclasses.replace(
        lm.settings,
        selector=selector,
        offload=offload_settings(cache, lm.selector),
        evict=cache.kind == "evict",
    )


def _evicts(settings: LayerSettings, shapes: Shapes) -> list[str]:
    """What a cache that evicts keeps, in words."""
    kept = kept_blocks(settings, shapes.capacity, shapes.new)
    if kept is None:
        return ["evict: the prompt is too short for anything to be given back"]
    blocks = shapes.capacity // settings.sparse.block_size
    return [f"evict: room for {kept} of a row's {blocks} blocks"]


def _check_cache(lm: LanguageModel, shapes: Shapes) -> None:
    """Refuses what an offloaded cache would refuse, also where `auto` may not offload.

    Whether a configuration is allowed must not depend on how much memory is free.
    """
    cache = lm.cache
    if cache.kind == "evict":
        offload_settings(cache, lm.selector)
        require(
            cache.exactness == "forecast",
            "CacheConfig.exactness",
            cache.exactness,
            "'forecast' with kind='evict'",
        )
        return
    if cache.kind == "resident":
        if cache.exactness == "verify":
            offload_settings(CacheConfig("offload", exactness="verify"), lm.selector)
        return
    offload_settings(dataclasses.replace(cache, kind="offload"), lm.selector)
    blocks = shapes.capacity // lm.sparse.block_size
    cache.slots(blocks, lm.selector.list_width(blocks, lm.sparse))


def _decide_kind(
    lm: LanguageModel, rows: int, shapes: Shapes, state: GenerateState | None
) -> tuple[CacheConfig, str | None]:
    """The configuration with `kind="auto"` decided, and why."""
    cache = lm.cache
    if cache.kind != "auto":
        return cache, None
    offload = dataclasses.replace(cache, kind="offload")
    if state is not None:
        if isinstance(state.cache, OffloadCache):
            return offload, "offload: as the conversation began"
        decided = dataclasses.replace(cache, kind="resident")
        return decided, "resident: as the conversation began"
    resident = dataclasses.replace(cache, kind="resident")
    reason = why_not(lm.settings, resident, rows, shapes, **_weights(lm))
    if reason is None:
        return resident, "resident: it fits, and needs no transfers"
    return offload, f"offload: {reason}"


def _decide_slots(
    lm: LanguageModel,
    cache: CacheConfig,
    settings: LayerSettings,
    rows: int,
    shapes: Shapes,
    state: GenerateState | None,
) -> tuple[CacheConfig, str | None]:
    """The configuration with `device_blocks="auto"` decided, and what it is."""
    asked = cache.device_blocks == "auto"
    # Of a conversation a list may have become longer than the slots are.
    longer = cache.device_blocks is None and state is not None
    if cache.kind != "offload" or not (asked or longer):
        return cache, None
    blocks = shapes.capacity // lm.sparse.block_size
    if state is not None:
        # A conversation keeps its slots; a list may have become longer than they are.
        assert isinstance(state.cache, OffloadCache)
        width = lm.selector.list_width(blocks, lm.sparse)
        count = max(state.cache.num_slots, min(width, blocks))
        layer0 = "offload" if state.cache.first is None else "resident"
        decided = dataclasses.replace(cache, device_blocks=count, layer0=layer0)
    else:
        ours = tree_bytes(lm.model) // lm.parts
        decided, _ = fill_slots(
            settings,
            cache,
            memory_limits(cache),
            batch=rows,
            shapes=shapes,
            others=held_by_others(ours),
            **_weights(lm),
        )
    count = decided.slots(blocks, 1)
    if not asked:
        return decided, None
    if state is not None:
        return decided, f"device_blocks: {count} of {blocks}, as the conversation began"
    return decided, f"device_blocks: {count} of {blocks} fit the device"


def _check_processes(lm: LanguageModel) -> None:
    """Raises ConfigError where every process would run the same request by itself.

    A model alone may be held so: training divides it by a mesh of its own.
    """
    count = jax.process_count()
    require(
        lm.mesh is not None or count == 1, "mesh", None, f"given with {count} processes"
    )


def refuse_in_session(cache: CacheConfig, mesh: MeshConfig | None) -> None:
    """Refuses what no session can have, whatever its model.

    Args:
      cache: Where the KV shall live.
      mesh: The devices; None for one.

    Raises:
      ConfigError: If a session cannot have them.
    """
    require(
        cache.kind != "evict",
        "CacheConfig.kind",
        cache.kind,
        "'resident', 'offload' or 'auto' in a session: its prompts come in pieces",
    )
    if mesh is None:
        return
    require(
        mesh.data == 1,
        "mesh",
        mesh.text,
        "data=1 in a session: its prompts run one after another, in which other groups "
        "would be idle",
    )
    if cache.kind == "offload" and cache.route != "auto":
        _refuse_route_on_mesh(named_route(cache.route))


def refuse_on_mesh(settings: LayerSettings) -> None:
    """Raises ConfigError for what several devices cannot do together."""
    if settings.evict:
        raise ConfigError(
            "CacheConfig.kind='evict' is not allowed on a mesh: use 'resident' or "
            "'offload'"
        )
    if settings.offload is not None:
        _refuse_route_on_mesh(settings.offload.route)


def _refuse_route_on_mesh(route: FetchRoute) -> None:
    """Raises ConfigError for a route that fetches between programs."""
    if not route.in_program:
        raise ConfigError(
            f"CacheConfig.route={route.name!r} is not allowed on a mesh: a layer is "
            "one call there; take another route"
        )


def _without_effect(lm: LanguageModel, cache: CacheConfig) -> list[str]:
    """What of the cache's configuration has no effect, in words."""
    usual = CacheConfig()
    given = [
        f"{name}={getattr(cache, name)!r}"
        for name in _OFFLOAD_ONLY
        if getattr(cache, name) != getattr(usual, name)
    ]
    if lm.cache.kind in ("resident", "evict") and given:
        return [f"no effect on a cache on the device: {', '.join(given)}"]
    if cache.kind == "offload" and cache.recall_every and not lm.selector.looks_ahead:
        return [f"no effect without a forecast: recall_every={cache.recall_every}"]
    return []
