"""Devices: they share the batch, and with `fsdp` the frozen weights.

Each device then holds a part of every layer's weights and gathers a layer's when that
layer runs.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey
from jaxtyping import Array

from sparda_jax.models.decoder import Decoder, DecoderLayer
from sparda_jax.models.spec import shard_axes

AXIS = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis over that many devices, or all."""
    found = jax.devices()
    return Mesh(np.asarray(found[: devices or len(found)]), (AXIS,))


def _split_axis(
    path: tuple[GetAttrKey, ...], shape: tuple[int, ...], parts: int
) -> int | None:
    """Which axis of a stacked weight devices divide; None for small ones."""
    for axis in shard_axes(path[0].name):
        if parts > 1 and shape[axis + 1] % parts == 0:
            return axis + 1
    return None


def layer_specs(model: Decoder, parts: int) -> DecoderLayer:
    """Partition of every stacked layer weight over `parts` devices."""

    def spec(path: tuple[GetAttrKey, ...], x: Array) -> PartitionSpec:
        axis = _split_axis(path, x.shape, parts)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

    return jax.tree_util.tree_map_with_path(spec, model.layers)


def model_specs(model: Decoder, mesh: Mesh, *, fsdp: bool) -> Decoder:
    """Partition of every weight: layers are divided with `fsdp`, the rest is whole."""
    specs = jax.tree.map(lambda _: PartitionSpec(), model)
    if fsdp:
        specs.layers = layer_specs(model, mesh.size)
    return specs


def place(x: Array | np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """An array laid out over the mesh; every process must hold all of it."""
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])


def shard_model(model: Decoder, mesh: Mesh, *, fsdp: bool) -> Decoder:
    """The model with its weights laid out over the mesh."""
    specs = model_specs(model, mesh, fsdp=fsdp)
    return jax.tree.map(lambda x, spec: place(x, mesh, spec), model, specs)


def make_gather(
    model: Decoder, mesh: Mesh, *, fsdp: bool
) -> Callable[[DecoderLayer], DecoderLayer]:
    """Makes one layer's weights whole inside `shard_map`."""
    if not fsdp or mesh.size == 1:
        return lambda layer: layer
    stacked, _ = jax.tree_util.tree_flatten_with_path(model.layers)
    axes = [_split_axis(path, x.shape, mesh.size) for path, x in stacked]

    def gather(layer: DecoderLayer) -> DecoderLayer:
        leaves, tree = jax.tree.flatten(layer)
        whole = []
        for x, axis in zip(leaves, axes, strict=True):
            if axis is not None:
                # One axis less than in the stack: the scan took the layers' one.
                x = jax.lax.all_gather(x, AXIS, axis=axis - 1, tiled=True)
            whole.append(x)
        return jax.tree.unflatten(tree, whole)

    return gather


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a `Batch` with a leading axis of micro batches."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))
