"""Windows and a budget for a model, by measuring its own queries on a text.

What the layer's own queries capture of the attention is the most that Forecast heads
which imitate them can: so windows and budget are chosen by it, before any training. The
windows are the coarsest ones that come near the best; the budget is the least one that
captures the share that is asked for.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import sparda_jax as sj
from sparda_jax.config import SparseConfig
from sparda_jax.evaluation.forecast_report import forecast_report, mean_over_domains
from sparda_jax.models.weights import from_query_heads

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
    on_layer: Callable[[], None] = lambda: None,
) -> Geometry:
    """Measures the selections and chooses windows and budget.

    Args:
      lm: Any attention; its own Forecast heads do not matter.
      texts: Token ids [rows, tokens] by domain.
      least_mass: Share of the attention that own queries must capture.
      tried: Selections that differ in their windows.
      budget: Blocks to take in any case; None chooses.
      on_layer: Called after each layer of each row (progress).

    Raises:
      ConfigError: Rows are no longer than a budget holds.
    """
    heads = from_query_heads(lm.model)
    model = lm.model.with_forecast(heads)
    measured, curves = [], {}
    for sparse in tried:
        chosen = dataclasses.replace(
            sj.with_attention(lm, "dense"),
            model=model,
            config=model.config,
            sparse=sparse,
            forecast_sparse=None,
        )
        chosen = sj.with_attention(chosen, "sparda")
        report = forecast_report(chosen, texts, about={}, on_layer=on_layer)
        blocks = next(iter(report["domains"].values()))["budgets"]["blocks"]
        own, oracle = (
            mean_over_domains(report, "budgets", f"{who}_mass").mean(0)
            for who in ("own", "oracle")
        )
        curves[sparse] = (blocks, own, oracle)
        for count, a, b in zip(blocks, own.tolist(), oracle.tolist(), strict=True):
            measured.append(
                {
                    "kernel_size": sparse.kernel_size,
                    "budget": count,
                    "own_mass": round(a, 6),
                    "oracle_mass": round(b, 6),
                }
            )

    def at_quarter(sparse: SparseConfig) -> float:
        blocks, own, _ = curves[sparse]
        return float(own[blocks.index(sparse.block_budget)])

    best = max(map(at_quarter, tried))
    near = [sparse for sparse in tried if at_quarter(sparse) >= best - _NEAR]
    sparse = max(near, key=lambda one: one.kernel_size)
    blocks, own, oracle = curves[sparse]
    if budget is None:
        # More than a half of the blocks is hardly sparse.
        most = tried[0].block_budget * 2
        allowed = [i for i, count in enumerate(blocks) if count <= most]
        at = next((i for i in allowed if own[i] >= least_mass), allowed[-1])
        budget = blocks[at]
    captured = float(np.interp(budget, blocks, own))
    return Geometry(
        sparse=dataclasses.replace(
            sparse,
            block_budget=budget,
            local_blocks=min(sparse.local_blocks, max(0, budget - 3)),
        ),
        own_mass=captured,
        oracle_mass=float(np.interp(budget, blocks, oracle)),
        reached=captured >= least_mass,
        measured=measured,
    )
