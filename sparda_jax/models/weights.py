"""A decoder from a checkpoint's tensors; random and abstract ones of any shape."""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sparda_jax.config import ConfigError, ModelConfig
from sparda_jax.models.decoder import Decoder, DecoderLayer, Storage
from sparda_jax.models.forecast import heads_from_query
from sparda_jax.models.int8_weight import Int8Weight, int8_weight, rounded
from sparda_jax.models.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Shape,
    base_shapes,
    forecast_shape,
    joined,
    layer_name,
    layer_parameters,
    layer_shapes,
    model_shapes,
)

# Arrays of a layer that `matmul` reads: nearly all of its numbers.
_LINEARS = ("qkv", "out", "gate_up", "down")

Load = Callable[[str], np.ndarray]
Put = Callable[[str, np.ndarray], Array]


def _layer_weights(
    config: ModelConfig, index: int, load: Load, put: Put
) -> dict[str, Array]:
    arrays = {}
    for array, parts in joined(layer_parameters(config)):
        stored = [load(layer_name(index, part.hf)) for part in parts]
        if parts[0].is_linear:
            whole = stored[0] if len(stored) == 1 else np.concatenate(stored, axis=-2)
            arrays[array] = whole.swapaxes(-1, -2)
        else:
            arrays[array] = stored[0] if len(stored) == 1 else np.concatenate(stored)
    return {name: put(name, array) for name, array in arrays.items()}


def build_decoder(
    config: ModelConfig,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    dtype: DTypeLike,
    storage: Storage = "per_layer",
    on_layer: Callable[[], None] | None = None,
    put: Put | None = None,
) -> Decoder:
    """A decoder from checkpoint tensors, without Forecast heads.

    Args:
      config: The model's shape.
      tensors: Loaders by checkpoint name; each is called once, from several threads.
      dtype: Type of the weights.
      storage: One array per layer, or stacked ones.
      on_layer: Called after each layer (progress).
      put: Puts an array, by the decoder's name of it, on its devices; None for the
        default one.

    Raises:
      ConfigError: If a tensor is missing or has another shape; names both shapes.
    """
    shapes = dict(base_shapes(config))
    place = put or (lambda _, array: jnp.asarray(array, dtype))

    def load(name: str) -> np.ndarray:
        if name not in tensors:
            raise ConfigError(f"tensor {name!r} is missing from model {config.name!r}")
        array = tensors[name]()
        if tuple(array.shape) != shapes[name]:
            raise ConfigError(
                f"tensor {name!r} has shape {tuple(array.shape)}; model "
                f"{config.name!r} needs {shapes[name]}"
            )
        return array

    # The largest arrays first, while there is room for a copy of each.
    head = None if config.tie_embeddings else place("head", load(HEAD))
    embedding = place("embedding", load(EMBEDDING))
    device = jax.config.jax_default_device  # other threads do not know it

    def layer(index: int) -> dict[str, Array]:
        with jax.default_device(device):
            return _layer_weights(config, index, load, place)

    layers: list[DecoderLayer] = []
    stack: dict[str, Array] | None = None
    for index, ready in enumerate(_made_in_order(layer, config.num_layers)):
        if storage == "stacked" and put is None:
            # A stack of what lies there already would hold all of it twice.
            stack = _stack_of(ready, config.num_layers) if stack is None else stack
            stack = _write_layer(stack, ready, index)
            jax.block_until_ready(stack)  # or layers pile up that wait to be written
        else:
            layers.append(DecoderLayer(ready))
        if on_layer is not None:
            on_layer()
    return Decoder(
        config,
        embedding=embedding,
        layers=layers if stack is None else DecoderLayer(stack),
        final_norm=place("final_norm", load(FINAL_NORM)),
        head=head,
        storage=storage,
    )


def _made_in_order[Made](make: Callable[[int], Made], count: int) -> Iterator[Made]:
    """`make` of 0 … count − 1 by a few threads, of which none runs far ahead.

    Dequantising and transposing are NumPy's work, which leaves Python's lock.
    """
    workers = min(4, os.cpu_count() or 1)
    waiting: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for index in range(count):
            waiting.append(pool.submit(make, index))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@functools.partial(jax.jit, static_argnums=1)
def _stack_of(layer: dict[str, Array], count: int) -> dict[str, Array]:
    """Zeros for that many layers."""
    return {k: jnp.zeros((count, *x.shape), x.dtype) for k, x in layer.items()}


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(
    stack: dict[str, Array], layer: dict[str, Array], index: int | Int[Array, ""]
) -> dict[str, Array]:
    """The stack, in its own memory, with that layer."""
    return {k: stack[k].at[index].set(x) for k, x in layer.items()}


def add_int8(model: Decoder) -> None:
    """Gives the linear weights of a decoder's layers, and its head, copies in integers.

    Decode reads them in place of the weights (`models.int8_weight`). Norms, biases,
    Forecast heads and the weights of experts have none.

    Args:
      model: A decoder with an array a layer; it is changed.
    """
    assert isinstance(model.layers, nnx.List)
    for layer in model.layers:
        for name in _LINEARS:
            weight = getattr(layer, name)
            if weight is not None:
                setattr(layer, name, nnx.Param(int8_weight(weight[...])))
    head = model.embedding if model.head is None else model.head
    model.head = nnx.data(nnx.Param(Int8Weight(None, *rounded(head[...]))))


def forecast_heads(
    config: ModelConfig, future: np.ndarray, current: np.ndarray, dtype: DTypeLike
) -> list[Array]:
    """Heads by consuming layer from checkpoint matrices.

    Args:
      config: The model's shape.
      future: q_future_proj of layers 0 … L−2, [L−1, K·R·H, D].
      current: q_curr_proj of layer 0, [K·R·H, D].
      dtype: Type of the heads.
    """
    assert future.shape[0] == config.num_layers - 1
    return [jnp.asarray(matrix.T, dtype) for matrix in (current, *future)]


def from_query_heads(model: Decoder, queries: int = 1) -> list[Array]:
    """Training-free heads of a loaded model (`models.forecast.heads_from_query`)."""
    sizes = (model.config.num_kv_heads, model.config.head_dim, queries)
    return [heads_from_query(query, *sizes) for query in model.query_weights()]


def random_tensors(
    config: ModelConfig, seed: int, scale: float = 0.02
) -> dict[str, Callable[[], np.ndarray]]:
    """Loaders of random float32 weights, norms near 1 (tests, speed experiments)."""
    shapes = dict(base_shapes(config))

    def make(index: int, name: str) -> np.ndarray:
        rng = np.random.default_rng((seed, index))
        values = rng.standard_normal(shapes[name], dtype=np.float32) * scale
        return values + 1 if name.endswith("norm.weight") else values

    return {
        name: jax.tree_util.Partial(make, index, name)
        for index, name in enumerate(shapes)
    }


def abstract_decoder(
    config: ModelConfig, dtype: DTypeLike, *, storage: Storage, forecast: bool
) -> Decoder:
    """A decoder of shapes without values."""

    def zeros(shape: Shape) -> Array:
        return jnp.zeros(shape, dtype)

    def make() -> Decoder:
        layer = layer_shapes(config)
        layers = [
            DecoderLayer({name: zeros(shape) for name, shape in layer.items()})
            for _ in range(config.num_layers)
        ]
        outside = {name: zeros(shape) for name, shape in model_shapes(config).items()}
        heads = [zeros(forecast_shape(config)) for _ in layers]
        return _assembled(config, layers, outside, heads if forecast else None, storage)

    return jax.eval_shape(make)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def draw_weight(
    key: Array, shape: Shape, dtype: DTypeLike, sharding: Sharding | None = None
) -> Array:
    """Random numbers for one array of a layer, made where they stay.

    Args:
      key: Of the generator.
      shape: Of the array.
      dtype: Its type.
      sharding: Devices that divide it; None for the default one.
    """
    if len(shape) == 1:  # Norms, and biases, of which ones are as good as any.
        drawn = jnp.ones(shape, dtype)
    else:
        drawn = (0.02 * jax.random.normal(key, shape)).astype(dtype)
    if sharding is None:
        return drawn
    return jax.lax.with_sharding_constraint(drawn, sharding)


@functools.partial(jax.jit, static_argnames=("layers", "shape", "dtype"))
def _draw_stack(key: Array, layers: int, shape: Shape, dtype: DTypeLike) -> Array:
    # Layer by layer: the generator's intermediates are several times as large.
    keys = jax.random.split(key, layers)
    return jax.lax.map(lambda key: draw_weight(key, shape, dtype), keys)


def random_decoder(
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    storage: Storage = "per_layer",
    forecast: bool = False,
    seed: int = 0,
) -> Decoder:
    """A decoder of random weights, drawn on the device (speed experiments)."""
    keys = map(jax.random.key, itertools.count(seed << 16))
    layer = layer_shapes(config)

    def draw(shape: Shape) -> Array:
        return draw_weight(next(keys), shape, dtype)

    def draw_stack(shape: Shape) -> Array:
        return _draw_stack(next(keys), config.num_layers, shape, dtype)

    layers: DecoderLayer | list[DecoderLayer]
    if storage == "stacked":
        layers = DecoderLayer({name: draw_stack(s) for name, s in layer.items()})
    else:
        layers = [
            DecoderLayer({name: draw(shape) for name, shape in layer.items()})
            for _ in range(config.num_layers)
        ]
    outside = {name: draw(shape) for name, shape in model_shapes(config).items()}
    heads = [draw(forecast_shape(config)) for _ in range(config.num_layers)]
    return _assembled(config, layers, outside, heads if forecast else None, storage)


def _assembled(config, layers, outside, heads, storage: Storage) -> Decoder:
    """A decoder of its layers, the arrays outside of them by name, and its heads."""
    return Decoder(
        config,
        embedding=outside["embedding"],
        layers=layers,
        final_norm=outside["final_norm"],
        head=outside.get("head"),
        forecast=heads,
        storage=storage,
    )
