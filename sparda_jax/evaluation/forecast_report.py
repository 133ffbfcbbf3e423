"""The Forecast report: what was measured as figures, and whether it is good enough.

    report = forecast_report(lm, {"manual": rows}, about={"heads": "heads.safetensors"})
    report["domains"]["manual"]["means"]["recall"]
    verdict(report, Thresholds(min_recall=0.9))

All figures are JSON. Lists by layer come first, then kv head or query head, then
position, budget, distance or size of the cache, as the key says.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sparda_jax.checks import number, optional, require, settle
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.forecast_measure import (
    SLOT_LISTS,
    Measured,
    MeasurePlan,
    make_plan,
    measure,
)

FORMAT, VERSION = "sparda-forecast-report", 1
_MASSES = ("forecast_mass", "own_mass", "oracle_mass")
_share = optional(number(least=0, most=1))


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What heads must reach in every domain; None asks for nothing.

    Attributes:
      min_recall: Mean recall of the chosen blocks.
      min_recall_at_budget: The same with the forced blocks.
      min_layer_recall: Recall of the chosen blocks in the worst layer.
      min_mass: Mean attention mass in the forecast's lists.
      max_lost: Mean mass of the own query's lists that the forecast's do not have.
    """

    min_recall: float | None = None
    min_recall_at_budget: float | None = None
    min_layer_recall: float | None = None
    min_mass: float | None = None
    max_lost: float | None = None

    def __post_init__(self) -> None:
        settle(self, **{f.name: _share for f in dataclasses.fields(self)})


def _json(values: Any) -> Any:
    """Rounded lists; None where nothing was counted."""
    if isinstance(values, np.ndarray | list | tuple):
        return [_json(x) for x in values]
    value = float(values)
    return round(value, 6) if math.isfinite(value) else None


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return over / under


def block_bytes(lm: LanguageModel) -> int:
    """Bytes of a KV block of one kv head."""
    size = lm.model.embedding[...].dtype.itemsize
    return 2 * lm.sparse.block_size * lm.config.head_dim * size


def _masses(measured: Measured, over: tuple[int, ...], at: int | None) -> dict:
    """The three masses, of a budget or of all, with the axes `over` summed up.

    Axes are layers, (budgets,) query heads and positions.
    """
    found = {}
    for name in _MASSES:
        mass = getattr(measured.sums, name)
        mass = mass if at is None else mass[:, at]
        rows = np.broadcast_to(
            measured.sums.rows[:, None]
            if at is not None
            else measured.sums.rows[:, None, None],
            mass.shape,
        )
        found[name] = _ratio(mass.sum(over), rows.sum(over))
    return found


def figures(measured: Measured, plan: MeasurePlan, lm: LanguageModel) -> dict[str, Any]:
    """The figures of one domain, as JSON."""
    sums: Any = measured.sums
    at = plan.at
    config, sparse = lm.config, lm.sparse
    hits, wanted = sums.hits[:, at], sums.wanted[:, at]  # layers, kv heads, positions
    recall = _ratio(hits.sum((1, 2)), wanted.sum((1, 2)))
    # Both lists of a token that counts hold all forced blocks.
    forced = sparse.forced_blocks * config.num_kv_heads * sums.rows.sum(1)
    layers = {
        "recall": recall,
        "recall_at_budget": _ratio(
            hits.sum((1, 2)) + forced, wanted.sum((1, 2)) + forced
        ),
        **_masses(measured, (1, 2), at),
        "overlap": measured.overlap[0],
        "own_overlap": measured.overlap[1],
    }
    layers["lost"] = layers["own_mass"] - layers["forecast_mass"]
    layers["lost_to_oracle"] = layers["oracle_mass"] - layers["forecast_mass"]
    shares = measured.misses / plan.budget
    fetched = measured.misses.sum(1) * config.num_kv_heads * block_bytes(lm)
    return {
        "rows": measured.rows,
        "tokens": measured.tokens,
        "means": {name: _json(np.mean(x)) for name, x in layers.items()},
        "layers": {name: _json(x) for name, x in layers.items()},
        "heads": {
            "recall": _json(_ratio(hits.sum(2), wanted.sum(2))),
            **{k: _json(v) for k, v in _masses(measured, (2,), at).items()},
        },
        "positions": {
            "edges": list(plan.edges),
            "recall": _json(_ratio(hits.sum(1), wanted.sum(1))),
            **{k: _json(v) for k, v in _masses(measured, (1,), at).items()},
        },
        "budgets": {
            "blocks": list(plan.budgets),
            "recall": _json(_ratio(sums.hits.sum((2, 3)), sums.wanted.sum((2, 3)))),
            **{k: _json(v) for k, v in _masses(measured, (2, 3), None).items()},
        },
        "distances": {
            "edges": list(plan.distances),
            "missed": _json(_ratio(sums.missed.sum(3), sums.distance.sum(3))),
            "wanted": _json(
                _ratio(sums.distance.sum(3), sums.distance.sum((2, 3))[..., None])
            ),
        },
        "misses": {
            "slots": [round(plan.budget * size) for size in SLOT_LISTS],
            "forecast": _json(shares[0]),
            "own": _json(shares[1]),
            "bytes_per_step": {
                "forecast": [round(x) for x in fetched[0]],
                "own": [round(x) for x in fetched[1]],
            },
        },
    }


def forecast_report(
    lm: LanguageModel,
    texts: Mapping[str, np.ndarray],
    *,
    about: Mapping[str, Any],
    on_layer: Callable[[], None] = lambda: None,
    on_domain: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures a model's Forecast heads on texts of several domains.

    Args:
      lm: Loaded with attention "sparda" and the heads to judge.
      texts: Token ids [rows, tokens] by domain; all of the same number of tokens.
      about: What else the report shall say of heads and texts, as JSON.
      on_layer: Called after each layer of each row (progress).
      on_domain: Called with what is known after each domain.

    Returns:
      The report, JSON: see the module's text.

    Raises:
      ConfigError: Rows of different lengths, or no longer than the budget holds; or a
        model whose selector has no Forecast, or that several devices share.
    """
    require(lm.mesh is None, "lm.mesh", lm.mesh and lm.mesh.text, "None: one device")
    lengths = sorted({rows.shape[1] for rows in texts.values()})
    require(len(lengths) == 1, "texts", lengths, "rows of one length")
    plan = make_plan(lm, lengths[0])
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": lm.config.name,
        "fingerprint": lm.fingerprint,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": lm.model.numbers,
        "sparse": dataclasses.asdict(lm.sparse),
        **about,
        "domains": {},
    }
    for name, rows in texts.items():
        measured = measure(lm, list(rows), plan, on_layer=on_layer)
        report["domains"][name] = figures(measured, plan, lm)
        on_domain(report)
    return report


def verdict(report: Mapping[str, Any], limits: Thresholds) -> list[dict[str, Any]]:
    """Each threshold that is asked for, in each domain, and whether it is met."""
    found = []
    for domain, figures in report["domains"].items():
        means = figures["means"]
        worst = min(figures["layers"]["recall"])
        checks = (
            ("recall", means["recall"], limits.min_recall, True),
            (
                "recall_at_budget",
                means["recall_at_budget"],
                limits.min_recall_at_budget,
                True,
            ),
            ("recall of the worst layer", worst, limits.min_layer_recall, True),
            ("forecast_mass", means["forecast_mass"], limits.min_mass, True),
            ("lost", means["lost"], limits.max_lost, False),
        )
        for figure, value, limit, above in checks:
            if limit is None:
                continue
            passed = value >= limit if above else value <= limit
            found.append(
                {
                    "domain": domain,
                    "figure": figure,
                    "value": value,
                    "limit": ("≥ " if above else "≤ ") + f"{limit:g}",
                    "passed": bool(passed),
                }
            )
    return found


def mean_over_domains(report: Mapping[str, Any], *path: str) -> np.ndarray:
    """A figure averaged over the domains; NaN where it was not measured."""
    values = []
    for figures in report["domains"].values():
        for key in path:
            figures = figures[key]
        values.append(np.asarray(figures, np.float64))
    return np.mean(values, axis=0)


def worst_layers(report: Mapping[str, Any], count: int = 3) -> list[int]:
    """The layers of least recall, the worst first."""
    recall = mean_over_domains(report, "layers", "recall")
    return [int(layer) for layer in np.argsort(recall, kind="stable")[:count]]
