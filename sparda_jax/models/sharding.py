"""A decoder over a mesh: which part of every array a device holds.

The table of parameters says by which of its dimensions an array is divided
(`spec.MESH_AXES`). Arrays that join several tensors (Q|K|V, gate|up) are put into
another order first, so that each device's part has its own tensors side by side: on a
device a decoder is one of fewer heads and a narrower MLP.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from sparda_jax.config import ConfigError, ModelConfig
from sparda_jax.mesh import MODEL, MeshConfig, place
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.spec import layer_shapes, split_axis, split_parts
from sparda_jax.models.weights import (
    abstract_decoder,
    draw_weight,
    from_query_heads,
)


def config_of_device(config: ModelConfig, parts: int) -> ModelConfig:
    """The model as one of `parts` devices has it; the vocabulary stays whole.

    Raises:
      ConfigError: If something cannot be divided; names the ways out.
    """
    if parts == 1:
        return config
    divided = {
        "num_kv_heads": config.num_kv_heads,
        "ffn_size": config.ffn_size,
        "shared_ffn_size": config.shared_ffn_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in divided.items():
        if size % parts:
            all_of_them = math.gcd(*divided.values())
            ways = [n for n in range(2, parts) if all_of_them % n == 0]
            smaller = f"model={ways[-1]}, or " if ways else ""
            raise ConfigError(
                f"mesh model={parts} cannot divide {name}={size} of {config.name!r}: "
                f"use {smaller}data={parts} for rows of their own on every device"
            )
    if config.key_bias:
        raise ConfigError(
            f"mesh model={parts} is not allowed for {config.name!r}: its key bias is "
            f"made of the values of all kv heads; use data={parts}"
        )
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        ffn_size=config.ffn_size // parts,
        shared_ffn_size=config.shared_ffn_size // parts,
    )


def device_order(
    name: str, array: np.ndarray, config: ModelConfig, parts: int
) -> np.ndarray:
    """A layer's array with what each device holds side by side.

    Args:
      name: The array's, as in `DecoderLayer`.
      array: One layer's, in the table's order.
      config: The whole model.
      parts: Devices that divide it.
    """
    axis, widths = split_axis(name), split_parts(name, config)
    if parts == 1 or axis is None or len(widths) == 1:
        return array
    pieces = np.split(array, np.cumsum(widths)[:-1], axis=axis)
    by_device = [np.split(piece, parts, axis=axis) for piece in pieces]
    ordered = [piece[device] for device in range(parts) for piece in by_device]
    return np.concatenate(ordered, axis=axis)


def placer(
    config: ModelConfig, mesh: MeshConfig, dtype: DTypeLike
) -> Callable[[str, np.ndarray], Array]:
    """What puts a loaded array, by its name, on its devices alone."""
    rank = {name: len(shape) for name, shape in layer_shapes(config).items()}

    def put(name: str, array: np.ndarray) -> Array:
        if name in rank:
            array = device_order(name, array, config, mesh.model)
        spec = _spec(name, rank.get(name, array.ndim), array.ndim)
        return place(array.astype(jnp.dtype(dtype), copy=False), mesh.devices, spec)

    return put


def _spec(name: str, rank: int, held: int) -> PartitionSpec:
    """Partition of an array that has `held` axes, of which the last `rank` count."""
    axis = split_axis(name)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*[None] * (held - rank + axis), MODEL)


def model_specs(model: Decoder, config: ModelConfig) -> Decoder:
    """Partition of every array of a decoder."""
    rank = {name: len(shape) for name, shape in layer_shapes(config).items()}

    def spec(path: tuple, x: Array) -> PartitionSpec:
        names = [str(getattr(key, "name", "")) for key in path]
        if "forecast" in names:  # [..., D, K·R·H]
            return PartitionSpec(*[None] * (x.ndim - 1), MODEL)
        name = next(
            n
            for n in reversed(names)
            if n in rank or split_axis(n) is not None or n == "final_norm"
        )
        return _spec(name, rank.get(name, x.ndim), x.ndim)

    return jax.tree_util.tree_map_with_path(spec, model)


def place_decoder(model: Decoder, config: ModelConfig, mesh: MeshConfig) -> Decoder:
    """A decoder in the devices' order, laid out over the mesh."""
    return jax.tree.map(
        lambda x, spec: place(x, mesh.devices, spec),
        model,
        model_specs(model, config),
    )


def random_on_mesh(config: ModelConfig, mesh: MeshConfig, dtype: DTypeLike) -> Decoder:
    """A decoder of random weights with Forecast heads (speed experiments).

    Every device draws its own part: none ever holds more.

    Args:
      config: The whole model.
      mesh: The devices.
      dtype: Type of the weights, an array a layer.
    """
    like = abstract_decoder(config, dtype, storage="per_layer", forecast=True)
    keys = map(jax.random.key, itertools.count())

    def draw(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> Array:
        sharding = NamedSharding(mesh.devices, spec)
        return draw_weight(next(keys), x.shape, x.dtype, sharding)

    return jax.tree.map(draw, like, model_specs(like, config))


def on_device(model: Decoder, config: ModelConfig) -> Decoder:
    """Inside `shard_map`: a device's part as the decoder that it is.

    Args:
      model: The device's arrays.
      config: What `config_of_device` gave.
    """
    other = jax.tree.map(lambda x: x, model)
    other.config = nnx.static(config)
    return other


def query_heads(model: Decoder, config: ModelConfig, mesh: MeshConfig) -> list[Array]:
    """`from_query_heads` of a decoder that is laid out over a mesh."""
    own = config_of_device(config, mesh.model)
    last = PartitionSpec(None, MODEL)

    def heads(model: Decoder) -> list[Array]:
        return from_query_heads(on_device(model, own))

    specs = model_specs(model, config)
    return jax.jit(
        jax.shard_map(
            heads, mesh=mesh.devices, in_specs=(specs,), out_specs=last, check_vma=False
        )
    )(model)
