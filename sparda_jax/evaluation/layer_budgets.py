"""A budget for each layer, chosen from a Forecast report, at the blocks of a flat one.

Layers differ: one finds 99 % of its attention in a few blocks, another spreads it over
hundreds. The report knows how much mass each layer's Forecast captures at each budget.
Blocks go to the layer where the next ones capture most, until as many are given away as
the flat budget reads. Mass is not quality: docs/budget.md has a case where perplexity
rose although the mass did.
"""

import heapq
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import integer, require, several
from sparda_jax.evaluation.forecast_report import mean_over_domains

_MAX_FILE = 1 << 20


def _envelope(
    blocks: Sequence[int], mass: Float[np.ndarray, " budgets"]
) -> list[tuple[float, int, int]]:
    """(mass a block, from, to) of the least concave curve above the points."""
    kept: list[tuple[int, float]] = []
    for point in zip(blocks, mass.tolist(), strict=True):
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2:]
            if (y1 - y0) * (point[0] - x1) > (point[1] - y1) * (x1 - x0):
                break
            kept.pop()
        kept.append(point)
    return [
        ((y1 - y0) / (x1 - x0), x0, x1)
        for (x0, y0), (x1, y1) in itertools.pairwise(kept)
    ]


def choose_layer_budgets(report: Mapping[str, Any]) -> tuple[int, ...]:
    """Block budgets by layer that read as much as the report's flat budget.

    Args:
      report: Of `forecast_report`.

    Returns:
      `SparseConfig.block_budget`: at least the least budget of the report each, and
      layers times the flat budget in all.
    """
    first = next(iter(report["domains"].values()))
    blocks = first["budgets"]["blocks"]
    curves = mean_over_domains(report, "budgets", "forecast_mass")
    found = [blocks[0]] * len(curves)
    left = report["sparse"]["block_budget"] * len(curves) - sum(found)
    # Of each layer the next part of its curve; parts of one layer come in order, as a
    # concave curve never rises faster later on.
    parts = [_envelope(blocks, curve) for curve in curves]
    heap = [(-gains[0][0], layer, 0) for layer, gains in enumerate(parts) if gains]
    heapq.heapify(heap)
    while heap and left > 0:
        _, layer, at = heapq.heappop(heap)
        _, begin, end = parts[layer][at]
        taken = min(end - begin, left)
        found[layer] += taken
        left -= taken
        if at + 1 < len(parts[layer]):
            heapq.heappush(heap, (-parts[layer][at + 1][0], layer, at + 1))
    return tuple(found)


def captured_mass(report: Mapping[str, Any], budgets: Sequence[int]) -> float:
    """Mean mass of the Forecast's lists with these budgets, on the report's texts.

    Between the budgets that the report measured it is interpolated.

    Raises:
      ConfigError: Not one budget a layer, or one below what was measured.
    """
    blocks = next(iter(report["domains"].values()))["budgets"]["blocks"]
    curves = mean_over_domains(report, "budgets", "forecast_mass")
    require(
        len(budgets) == len(curves),
        "block_budget",
        f"{len(budgets)} budgets",
        f"{len(curves)} budgets, one a layer",
    )
    least = min(budgets)
    require(
        least >= blocks[0], "block_budget", least, f"at least {blocks[0]}, measured"
    )
    found = [
        np.interp(budget, blocks, curve)
        for budget, curve in zip(budgets, curves, strict=True)
    ]
    return float(np.mean(found))


def compare_budgets(report: Mapping[str, Any], budgets: Sequence[int]) -> dict:
    """Budgets by layer against the flat one, as JSON for the report."""
    flat = report["sparse"]["block_budget"]
    return {
        "block_budget": list(budgets),
        "blocks_read": float(np.mean(budgets)),
        "flat": flat,
        "mass": round(captured_mass(report, budgets), 6),
        "flat_mass": round(captured_mass(report, [flat] * len(budgets)), 6),
    }


def write_layer_budgets(path: str | os.PathLike, budgets: Sequence[int]) -> None:
    """Writes budgets as a JSON file that `read_layer_budgets` takes.

    Raises:
      CheckpointError: The place cannot be written to.
    """
    write_json(path, {"block_budget": list(budgets)})


def read_layer_budgets(path: str | os.PathLike) -> tuple[int, ...]:
    """Budgets that `write_layer_budgets` wrote.

    Raises:
      CheckpointError: There is no such file, or it holds no such thing.
      ConfigError: A budget is no positive integer.
    """
    held = read_json(path, _MAX_FILE)
    if held is None or not isinstance(held.get("block_budget"), list):
        raise CheckpointError(
            f"{path}: holds no budgets by layer: it must be JSON with a list "
            '"block_budget"'
        )
    return several(integer(1), "blocks")("block_budget", held["block_budget"])
