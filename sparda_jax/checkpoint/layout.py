"""Checks of a model's tensors against its configuration, in Hugging Face terms."""

import os
import re
from collections.abc import Mapping

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.config import ModelConfig
from sparda_jax.models.spec import Shape, base_shapes, forecast_shape, layer_name

_FORECAST = re.compile(
    r"(?:(?:module|model)\.)*layers\.(\d{1,5})\.self_attn\."
    r"(q_future_proj|q_curr_proj)\.(weight|gain|down|up)"
)
# What a low-rank file holds of a layer in the place of its matrix, outputs first.
PARTS = ("gain", "down", "up")


def future_name(layer: int) -> str:
    """Name of layer `layer`'s Forecast projection, [K·R·H, D]."""
    return layer_name(layer, "self_attn.q_future_proj.weight")


CURRENT = layer_name(0, "self_attn.q_curr_proj.weight")


def forecast_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the Forecast tensors: layers 0..L-2, and layer 0's own projection.

    The last layer has no successor to forecast for; its projection, which some files
    hold, is never used.
    """
    shape = forecast_shape(config)[::-1]
    names = [future_name(layer) for layer in range(config.num_layers - 1)]
    return dict.fromkeys([*names, CURRENT], shape)


def low_rank_shapes(config: ModelConfig, rank: int) -> dict[str, Shape]:
    """Shapes of the tensors of a low-rank file (`models.low_rank`)."""
    inputs, outputs = forecast_shape(config)
    by_part = {"gain": (inputs,), "down": (rank, inputs), "up": (outputs, rank)}
    return {
        part_name(name, part): by_part[part]
        for name in forecast_shapes(config)
        for part in PARTS
    }


def part_name(weight: str, part: str) -> str:
    """Name of a part of a Forecast matrix, by the matrix's."""
    return f"{weight.removesuffix('weight')}{part}"


def parse_forecast_name(name: str) -> tuple[int, str] | None:
    """Splits a Forecast tensor's name into layer and projection.

    The prefixes `module.` and `model.` may be there or not, in any order.

    Returns:
      (layer, "q_future_proj.weight" or the like), or None for any other name.
    """
    match = _FORECAST.fullmatch(name)
    return (int(match[1]), f"{match[2]}.{match[3]}") if match else None


def check_shape(path: str | os.PathLike, name: str, found: Shape, want: Shape) -> None:
    """Raises CheckpointError unless `found` is `want`."""
    if found != want:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(found)}, wanted {list(want)}"
        )


def check_base(
    path: str | os.PathLike, config: ModelConfig, found: Mapping[str, Shape]
) -> list[str]:
    """Checks that `found` holds every tensor of the base model in the right shape.

    Returns:
      The names of the base model's tensors.

    Raises:
      CheckpointError: A tensor is missing or has another shape.
    """
    names = []
    for name, want in base_shapes(config):
        if name not in found:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(want)} is missing"
            )
        check_shape(path, name, found[name], want)
        names.append(name)
    return names


def check_forecast(
    path: str | os.PathLike,
    config: ModelConfig,
    found: Mapping[str, Shape],
    rank: int | None = None,
) -> dict[str, str]:
    """Checks the Forecast tensors among `found`, all of them or none.

    Args:
      path: For messages.
      config: The base model's.
      found: Shapes by the names of the file.
      rank: Of a low-rank file; None: it holds whole matrices.

    Returns:
      Name in the file by canonical name, for the tensors of `forecast_shapes` or
      `low_rank_shapes`; empty if the file has no Forecast tensor.

    Raises:
      CheckpointError: Some are missing, wrong in shape, named twice or of a layer that
        the model does not have.
    """
    names: dict[str, str] = {}
    for name in found:
        parsed = parse_forecast_name(name)
        if parsed is None:
            continue
        layer, kind = parsed
        allowed = config.num_layers if kind.startswith("q_future_proj") else 1
        if layer >= allowed:
            raise CheckpointError(
                f"{path}: tensor {show(name)} is of layer {layer}, allowed for "
                f"{kind.partition('.')[0]}: "
                f"layers 0 to {allowed - 1}"
            )
        canonical = layer_name(layer, f"self_attn.{kind}")
        if canonical in names:
            raise CheckpointError(
                f"{path}: tensors {names[canonical]} and {name} are the same one"
            )
        names[canonical] = name
    if not names:
        return {}
    wanted = forecast_shapes(config)
    if rank is not None:
        wanted = low_rank_shapes(config, rank)
    for canonical, want in wanted.items():
        if canonical not in names:
            raise CheckpointError(
                f"{path}: Forecast tensor {canonical} of shape {list(want)} is missing"
            )
        check_shape(path, names[canonical], found[names[canonical]], want)
    return {canonical: names[canonical] for canonical in wanted}
