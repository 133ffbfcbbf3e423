"""Several devices: a mesh of two axes, rows over `data`, kv heads over `model`."""

import dataclasses
import functools
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sparda_jax.checks import ConfigError, integer, require, settle, shown

DATA, MODEL = "data", "model"
_MOST = 2**16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices share the rows, and how many every layer.

    Attributes:
      data: Groups of devices that each have rows of their own.
      model: Devices that divide every layer: kv heads with their queries, slots,
        indices and host blocks, the MLP's inner width and the vocabulary.
    """

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        settle(self, data=integer(1, _MOST), model=integer(1, _MOST))

    @staticmethod
    def parse(field: str, value: object) -> "MeshConfig":
        """A mesh from `data=1,model=2`; an axis that is left out has one device.

        Raises:
          ConfigError: If the text is none.
        """
        found = [
            re.fullmatch(r"(data|model)=([1-9][0-9]{0,4})", part)
            for part in (value.split(",") if isinstance(value, str) else [""])
        ]
        sizes = {match[1]: int(match[2]) for match in found if match is not None}
        if len(sizes) != len(found) or max(sizes.values()) > _MOST:
            raise ConfigError(
                f"{field}={shown(value)} is not allowed: it must be like "
                f"data=1,model=2, with at most {_MOST} devices an axis"
            )
        return MeshConfig(**sizes)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.model

    @property
    def text(self) -> str:
        """As `parse` takes it."""
        return f"data={self.data},model={self.model}"

    @property
    def devices(self) -> Mesh:
        """The mesh over the first devices.

        Raises:
          ConfigError: If there are fewer of them.
        """
        return _mesh(self)


def place(x: Array | np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """An array laid out over a mesh: devices get their parts and no more.

    Where the mesh spans several processes, each must hold all of the array; nothing is
    exchanged.

    Args:
      x: The array.
      mesh: The devices.
      spec: How they divide it.
    """
    sharding = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array) and (
        sharding.is_fully_addressable or not x.is_fully_addressable
    ):
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])


def laid_out(types: Any, specs: Any, mesh: Mesh) -> Any:
    """The types of a tree of arrays with their places, to compile before they exist.

    Args:
      types: Arrays or their types, of all devices.
      specs: How the devices divide each of them.
      mesh: The devices.
    """

    def typed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(typed, types, specs)


def present_devices() -> list[jax.Device]:
    """The devices that JAX starts with.

    Raises:
      ConfigError: If it cannot start: a card is lost, or the platform is not here.
    """
    try:
        return jax.devices()
    # The second is JAX's where it looked for a platform and found none of it.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or "what is installed"
        why = " ".join(str(error).split()) or "there is no such device here"
        raise ConfigError(
            f"JAX cannot start its devices ({asked}): {why}; see what nvidia-smi says, "
            "or set JAX_PLATFORMS=cpu"
        ) from error


@functools.lru_cache(16)
def _mesh(config: MeshConfig) -> Mesh:
    found = present_devices()
    require(
        config.size <= len(found),
        "mesh",
        config.text,
        f"at most {len(found)} devices, which is what is here",
    )
    return jax.make_mesh(
        (config.data, config.model),
        (DATA, MODEL),
        (AxisType.Auto, AxisType.Auto),
        devices=found[: config.size],
    )
