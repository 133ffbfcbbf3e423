"""Programs over a mesh: what a session runs, on every device's part of the arrays.

A program is the function of one device under `jax.shard_map`: rows and kv heads are
divided, so nothing of the KV ever leaves its device. What is summed over devices is
written down where it is made: after `out` and `down` (`models.block`), of the embedding
(`models.decoder`), of drawn tokens and of logits where they are asked for
(`models.vocabulary`), and here of the counters.

How the arrays of a state are divided is not written down at all: it is what differs
between the state of one device and that of all.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sparda_jax.cache.counters import WideCount
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.memory import host_shape, host_zeros
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ModelConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.inference.generate import (
    WITHOUT_ROWS,
    GenerateState,
    Prompt,
    Request,
    new_state,
)
from sparda_jax.inference.prefixes import PrefixBlocks, PrefixIndex, take_prefix
from sparda_jax.inference.shapes import Shapes
from sparda_jax.mesh import DATA, MODEL, MeshConfig, laid_out, place
from sparda_jax.models.decoder import Decoder, DecoderLayer, Storage
from sparda_jax.models.sharding import model_specs, on_device
from sparda_jax.models.spec import layer_shapes

_WHOLE, _ROWS = PartitionSpec(), PartitionSpec(DATA)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """What the arrays of a session's state depend on.

    Attributes:
      config: The whole model.
      settings: Of one device.
      mesh: The devices.
      rows: Rows of all devices.
      shapes: Sizes.
      cache: Where the KV lives.
      dtype, storage: The model's.
      top_logprobs: Likeliest tokens whose log-probabilities have room; None for none.
    """

    config: ModelConfig
    settings: LayerSettings
    mesh: MeshConfig
    rows: int
    shapes: Shapes
    cache: CacheConfig
    dtype: Any
    storage: Storage
    top_logprobs: int | None = None

    def abstract(self, *, data: int = 1, model: int = 1) -> GenerateState:
        """The state of that many groups and of that many devices of a layer."""
        config = self.settings.config
        if model > 1:
            config = self.config
        settings = dataclasses.replace(self.settings, config=config)
        rows = self.rows // self.mesh.data * data
        stores: list[HostStore] = []
        like = _decoder_like(self.config, self.dtype, self.storage)

        def make() -> GenerateState:
            state = new_state(
                like,
                settings,
                rows,
                self.shapes,
                self.cache,
                abstract=True,
                top_logprobs=self.top_logprobs,
            )
            if isinstance(state.cache, OffloadCache):
                # The store is of types, which no traced function can give.
                stores.append(state.cache.store)
                state = without_store(state)
            return state

        state = jax.eval_shape(make)
        if not stores:
            return state
        assert isinstance(state.cache, OffloadCache)
        return state._replace(cache=state.cache._replace(store=stores[0]))

    def specs(self) -> GenerateState:
        """Partition of every array: an axis that grows with the devices is divided."""
        return _specs(self)

    def prefix_specs(self) -> tuple[PrefixBlocks, PrefixIndex]:
        """Partition of what `take_prefix` gives, of however many blocks."""
        return _prefix_specs(self)

    def types(self) -> GenerateState:
        """The whole state's types with their places, to compile before it is made."""
        mesh = self.mesh.devices
        whole = self.abstract(data=self.mesh.data, model=self.mesh.model)
        specs = self.specs()
        types = laid_out(whole, specs, mesh)
        if not self.settings.offload:
            return types
        parts = tuple(
            host_shape(part.shape, part.dtype, mesh=mesh, spec=spec)
            for part, spec in zip(
                whole.cache.store.parts,  # pyrefly: ignore
                specs.cache.store.parts,  # pyrefly: ignore
                strict=True,
            )
        )
        store = dataclasses.replace(types.cache.store, parts=parts)
        return types._replace(cache=types.cache._replace(store=store))


@functools.lru_cache(64)
def _specs(layout: StateLayout) -> GenerateState:
    """Partition of every array: an axis that grows with the devices is divided."""
    return _divided(layout, lambda state: state)


@functools.lru_cache(64)
def _prefix_specs(layout: StateLayout) -> tuple[PrefixBlocks, PrefixIndex]:
    """Partition of a row's blocks and index."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    take = functools.partial(take_prefix, settings=layout.settings, count=1)
    return _divided(layout, lambda state: jax.eval_shape(take, state, number, number))


def _divided(layout: StateLayout, part: Callable[[GenerateState], Any]) -> Any:
    """Partition of every array of a part of the state."""

    def spec(x: Any, more_heads: Any, more_rows: Any) -> PartitionSpec:
        triples = zip(x.shape, more_heads.shape, more_rows.shape, strict=True)
        axes = [
            tuple(name for name, wide in ((DATA, rows), (MODEL, heads)) if wide != size)
            for size, heads, rows in triples
        ]
        return PartitionSpec(*(axis or None for axis in axes))

    return jax.tree.map(
        spec,
        part(layout.abstract()),
        part(layout.abstract(model=layout.mesh.model)),
        part(layout.abstract(data=layout.mesh.data)),
    )


@functools.lru_cache(16)
def _decoder_like(config: ModelConfig, dtype: Any, storage: Storage) -> Decoder:
    """A decoder of that type and storage, with next to nothing in it."""
    # It may be asked for while a program is traced, of which it is no part.
    with jax.ensure_compile_time_eval():
        empty = jnp.zeros((1, 1), dtype)
        layer = DecoderLayer(dict.fromkeys(layer_shapes(config), empty))
        return Decoder(
            config,
            embedding=empty,
            layers=layer if storage == "stacked" else [layer],
            final_norm=empty[0],
            head=None,
            storage=storage,
        )


def without_store(state: GenerateState) -> GenerateState:
    """The state, or its partitions, without a host store, if it has one."""
    if not isinstance(state.cache, OffloadCache):
        return state
    kept = state.cache._replace(store=None)  # pyrefly: ignore
    return state._replace(cache=kept)


def empty_store(layout: StateLayout) -> HostStore:
    """An offloaded cache's host store of zeros, every device's part on its own link."""
    mesh, specs = layout.mesh, layout.specs()
    whole = layout.abstract(data=mesh.data, model=mesh.model)
    assert isinstance(whole.cache, OffloadCache)
    assert isinstance(specs.cache, OffloadCache)
    store = whole.cache.store
    parts = tuple(
        host_zeros(part.shape, part.dtype, mesh=mesh.devices, spec=spec)
        for part, spec in zip(store.parts, specs.cache.store.parts, strict=True)
    )
    return dataclasses.replace(store, parts=parts)


def new_mesh_state(layout: StateLayout) -> GenerateState:
    """An empty state, every part made where it stays.

    Raises:
      ConfigError: As `new_state`.
    """
    specs, mesh = layout.specs(), layout.mesh
    rows = layout.rows // mesh.data
    like = _decoder_like(layout.config, layout.dtype, layout.storage)

    def make() -> GenerateState:
        state = new_state(
            like,
            layout.settings,
            rows,
            layout.shapes,
            layout.cache,
            abstract=True,
            top_logprobs=layout.top_logprobs,
        )
        return without_store(state)

    out = without_store(specs)
    made = jax.jit(
        jax.shard_map(
            make, mesh=mesh.devices, in_specs=(), out_specs=out, check_vma=False
        )
    )()
    if not isinstance(made.cache, OffloadCache):
        return made
    return made._replace(cache=made.cache._replace(store=empty_store(layout)))


def _sum_of_devices(count: WideCount) -> WideCount:
    """The sum of every device's 64-bit counts."""
    high, low = (jax.lax.all_gather(word, (DATA, MODEL)) for word in count)
    total = WideCount(high[0], low[0])
    for device in range(1, high.shape[0]):
        total = total.plus(WideCount(high[device], low[device]))
    return total


def _is_count(x: Any) -> bool:
    return isinstance(x, WideCount)


def _map_counts(function: Callable[..., WideCount], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=_is_count)


def _count_apart(function: Callable, arguments: list) -> Any:
    """Runs on a state whose counters are those of all devices, and leaves such ones.

    The function may give other things behind the state, or none at all.
    """
    before: dict[str, Any] = {}
    for number, argument in enumerate(arguments):
        if isinstance(argument, GenerateState):
            before = {name: getattr(argument, name) for name in WITHOUT_ROWS}
            zeros = {
                name: jax.tree.map(jnp.zeros_like, x) for name, x in before.items()
            }
            arguments[number] = argument._replace(**zeros)
    result = function(*arguments)
    state = result if isinstance(result, GenerateState) else result[0]
    if not isinstance(state, GenerateState):
        return result
    others = () if state is result else result[1:]
    for name in WITHOUT_ROWS:
        total = _map_counts(_sum_of_devices, getattr(state, name))
        if before:
            total = _map_counts(WideCount.plus, before[name], total)
        state = state._replace(**{name: total})
    return (state, *others) if others else state


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A function of (model, …) as a program over a mesh.

    Attributes:
      function: Of one device. The type that its signature gives, or each of a tuple,
        says how its result is divided: what is no state, nor part of one, is whole on
        every device.
      layout: Of the state that it takes or gives; None without one.
      config: The whole model.
      own: The model of one device.
      mesh: The devices.
    """

    function: Callable
    layout: StateLayout | None
    config: ModelConfig
    own: ModelConfig
    mesh: MeshConfig

    @property
    def compiler_options(self) -> dict[str, bool]:
        """What it is compiled with.

        On GPUs XLA's latency hiding scheduler runs by itself where a program has
        collectives. A fetch looks to it as if it took no time, so it has it begin
        behind the layer that it should run beside.
        """
        return {"xla_gpu_enable_latency_hiding_scheduler": False}

    def __call__(self, *arguments: Any, **static: Hashable) -> Any:
        """Traces the program."""

        def local(*arguments: Any) -> Any:
            given = [
                on_device(x, self.own) if isinstance(x, Decoder) else x
                for x in arguments
            ]

            def run(*arguments: Any) -> Any:
                return self.function(*arguments, **static)

            return run(*given) if self.layout is None else _count_apart(run, given)

        return jax.shard_map(
            local,
            mesh=self.mesh.devices,
            in_specs=tuple(map(self._spec, arguments)),
            out_specs=self._out_specs(),
            check_vma=False,
        )(*arguments)

    def _out_specs(self) -> Any:
        given = inspect.signature(self.function).return_annotation
        if get_origin(given) is tuple:
            return tuple(map(self._spec_of, get_args(given)))
        return self._spec_of(given)

    def _spec_of(self, kind: type) -> Any:
        """Partition of what is of a type, where the type alone says it."""
        if kind not in (GenerateState, PrefixBlocks, PrefixIndex):
            return _WHOLE
        assert self.layout is not None
        if kind is GenerateState:
            return self.layout.specs()
        blocks, index = self.layout.prefix_specs()
        return blocks if kind is PrefixBlocks else index

    def _spec(self, argument: Any) -> Any:
        if isinstance(argument, Decoder):
            return model_specs(argument, self.config)
        # Of a single row, or of a sequence with a cache of its own, devices have all.
        rows = 1 if self.layout is None else self.layout.rows
        if isinstance(argument, Prompt):
            return _ROWS if argument.count.shape[0] == rows else _WHOLE
        if isinstance(argument, Request):
            return _request_specs(argument, rows)
        return self._spec_of(type(argument))


def on_devices(
    lm: LanguageModel, function: Callable, layout: StateLayout | None
) -> Callable:
    """The function as it runs on the devices of a model.

    Args:
      lm: The model.
      function: Of (model, ...); of one device.
      layout: Of the state that it takes or gives; None without one.
    """
    if lm.mesh is None:
        return function
    own = lm.settings.config
    return OnMesh(function, layout, lm.config, own, lm.mesh)


def place_request(request: Request, layout: StateLayout) -> Request:
    """A request on its devices: else every call brings it there anew.

    Arrays that are there already stay the same arrays.
    """
    mesh = layout.mesh.devices

    def placed(x: Array, spec: PartitionSpec) -> Array:
        there = x.sharding == NamedSharding(mesh, spec)
        return x if there else place(x, mesh, spec)

    specs = _request_specs(request, layout.rows)
    return jax.tree.map(placed, request, specs)


def _request_specs(request: Request, rows: int) -> Request:
    def spec(x: Array) -> PartitionSpec:
        divided = x.ndim > 0 and x.shape[0] == rows
        return _ROWS if divided else _WHOLE

    whole = jax.tree.map(lambda _: _WHOLE, request)
    of_rows = {
        name: jax.tree.map(spec, getattr(request, name))
        for name in ("sampling", "max_new", "min_new", "logged")
    }
    stops = spec(request.stops) if request.stops.ndim > 1 else _WHOLE
    return whole._replace(stops=stops, **of_rows)
