"""Windows and a budget for a model, by measuring its own queries on a text.

What the layer's own queries capture of the attention is the most that Forecast heads
which imitate them can: so windows and budget are chosen by it, before any training. The
windows are the coarsest ones that come near the best, and, where passkeys are asked
for, keep those that dense attention finds; the budget is the least one that captures
the share that is asked for. Fewer local blocks are taken where they capture more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import sparda_jax as sj
from sparda_jax.config import SparseConfig
from sparda_jax.evaluation.forecast_report import forecast_report, mean_over_domains

# Mass that coarser windows may lose against the best ones: they cost less to score.
_NEAR = 0.003
# Rows longer than this are not scored with the finest windows.
_LONG = 8192


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A block selection and what was measured on the way to it.

    Attributes:
      sparse: The selection.
      own_mass: Attention mass that own queries capture with it, mean of the layers.
      oracle_mass: What the best blocks would.
      reached: Whether `own_mass` is the share that was asked for.
      measured: Every kernel size and budget that was tried, as JSON.
    """

    sparse: SparseConfig
    own_mass: float
    oracle_mass: float
    reached: bool
    measured: list[dict[str, Any]]


def candidates(tokens: int, block_size: int = 64) -> list[SparseConfig]:
    """Selections to try for rows of that many tokens: a quarter of the blocks is read,
    a quarter of those are local."""
    budget = max(4, tokens // block_size // 4)
    kernels = (16, 32, 64) if tokens > _LONG else (8, 16, 32)
    return [
        SparseConfig(
            kernel_size=kernel,
            kernel_stride=kernel // 2,
            block_size=block_size,
            init_blocks=1,
            local_blocks=max(1, budget // 4),
            block_budget=budget,
        )
        for kernel in kernels
    ]


def choose_geometry(
    lm: sj.LanguageModel,
    texts: Mapping[str, np.ndarray],
    *,
    least_mass: float,
    tried: list[SparseConfig],
    budget: int | None = None,
    keep: Callable[[list[SparseConfig]], SparseConfig] = lambda near: near[0],
    on_layer: Callable[[], None] = lambda: None,
) -> Geometry:
    """Measures the selections and chooses windows, local blocks and budget.

    Args:
      lm: Any attention, and any Forecast heads: what they choose does not matter.
      texts: Token ids [rows, tokens] by domain.
      least_mass: Share of the attention that own queries must capture.
      tried: Selections that differ in their windows; of several, the chosen one is
        measured with fewer local blocks too.
      budget: Blocks to take in any case; None chooses.
      keep: Chooses of the selections that come near the best, coarsest windows first.
      on_layer: Called after each layer of each row (progress).

    Raises:
      ConfigError: Rows are no longer than a budget holds.
    """
    curves = {one: _curve(lm, texts, one, on_layer) for one in tried}
    best = max(curves[one].at_quarter for one in tried)
    near = [one for one in tried if curves[one].at_quarter >= best - _NEAR]
    near.sort(key=lambda one: -one.kernel_size)
    first = near[0]
    fewer = dataclasses.replace(first, local_blocks=max(1, first.local_blocks // 4))
    if len(tried) > 1 and fewer != first:
        curves[fewer] = _curve(lm, texts, fewer, on_layer)
        # A local block is never fetched and never scored: on near ties it stays.
        if curves[fewer].at_quarter > curves[first].at_quarter + _NEAR:
            first = fewer
    curve = curves[first]
    # More than a half of the blocks is hardly sparse.
    most = first.largest_budget * 2
    budget = curve.least(least_mass, most) if budget is None else budget
    local = min(first.local_blocks, max(0, budget - 3))
    chosen = keep(
        [
            dataclasses.replace(one, block_budget=budget, local_blocks=local)
            for one in near
        ]
    )
    of_windows = {one.kernel_size: curves[one] for one in near}
    of_windows[first.kernel_size] = curve
    own, oracle = of_windows[chosen.kernel_size].at(budget)
    return Geometry(
        sparse=chosen,
        own_mass=own,
        oracle_mass=oracle,
        reached=own >= least_mass,
        measured=[row for one, found in curves.items() for row in found.rows(one)],
    )


@dataclasses.dataclass(frozen=True)
class _Curve:
    """What a selection captures, by budget.

    Attributes:
      quarter: The budget that it was measured at.
      blocks: Budgets, ascending.
      own, oracle: Attention mass by own queries and by the best blocks.
    """

    quarter: int
    blocks: list[int]
    own: list[float]
    oracle: list[float]

    @property
    def at_quarter(self) -> float:
        return self.own[self.blocks.index(self.quarter)]

    def at(self, budget: int) -> tuple[float, float]:
        own, oracle = (
            np.interp(budget, self.blocks, x) for x in (self.own, self.oracle)
        )
        return float(own), float(oracle)

    def least(self, mass: float, most: int) -> int:
        """The least budget that captures the mass, or the largest that is allowed."""
        allowed = [i for i, count in enumerate(self.blocks) if count <= most]
        at = next((i for i in allowed if self.own[i] >= mass), allowed[-1])
        return self.blocks[at]

    def rows(self, sparse: SparseConfig) -> list[dict[str, Any]]:
        """The same as JSON."""
        return [
            {
                "kernel_size": sparse.kernel_size,
                "local_blocks": sparse.local_blocks,
                "budget": count,
                "own_mass": round(own, 6),
                "oracle_mass": round(oracle, 6),
            }
            for count, own, oracle in zip(
                self.blocks, self.own, self.oracle, strict=True
            )
        ]


def _curve(
    lm: sj.LanguageModel,
    texts: Mapping[str, np.ndarray],
    sparse: SparseConfig,
    on_layer: Callable[[], None],
) -> _Curve:
    """Measures one selection."""
    chosen = dataclasses.replace(
        sj.with_attention(lm, "dense"), sparse=sparse, forecast_sparse=None
    )
    chosen = sj.with_attention(chosen, "sparda")
    report = forecast_report(chosen, texts, about={}, on_layer=on_layer)
    blocks = next(iter(report["domains"].values()))["budgets"]["blocks"]
    own, oracle = (
        mean_over_domains(report, "budgets", f"{who}_mass").mean(0).tolist()
        for who in ("own", "oracle")
    )
    return _Curve(sparse.largest_budget, blocks, own, oracle)
