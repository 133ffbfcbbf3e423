"""Whether Forecast heads of one base model serve another file of the same model.

Heads name the hash of their base. Another quantisation of the same model has another
hash and much the same activations, and nothing but a measurement can tell whether its
heads still fit.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparda_jax.checks import ConfigError
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.documents import token_rows
from sparda_jax.evaluation.forecast_report import forecast_report
from sparda_jax.models.weights import from_query_heads

# A row of Python's manual, read in few blocks: less than a minute on a CPU.
_TOKENS, _BUDGET, _LOCAL = 1536, 10, 2
# Recall that may be lost against what the file says of its own base and text.
_LOST = 0.1
# Below training-free heads of as many queries: heads that are those of another file.
_NEAR = 0.02


def check_other_base(lm: LanguageModel, info: Mapping[str, Any]) -> float:
    """Measures heads on a model that is not the one that they were trained for.

    Args:
      lm: The model with the heads.
      info: What the file says (`ForecastWeights.info`).

    Returns:
      Their recall of the chosen blocks, mean of the layers, on a row of the manual.

    Raises:
      ConfigError: The recall is below that of the training-free heads, or far below
        what the file says; or the model has no tokenizer or too little context.
    """
    if lm.tokenizer is None:
        raise ConfigError(
            "forecast_base='same-architecture' is not allowed: the heads' recall is "
            f"to be measured on a text, and {lm.no_tokenizer}"
        )
    sparse = dataclasses.replace(
        lm.sparse,
        block_budget=_BUDGET,
        local_blocks=_LOCAL,
        init_blocks=1,
        query_blocks=min(lm.sparse.query_blocks, _BUDGET),
    )
    size = max(_TOKENS, 2 * _BUDGET * sparse.block_size)
    rows = token_rows("pydoc", lm.tokenizer.encode, tokens=size, count=1)
    queries = lm.config.forecast_queries
    model = lm.model.with_forecast(from_query_heads(lm.model, queries))
    plain = dataclasses.replace(lm, model=model, config=model.config)
    ours, free = (_recall(one, sparse, rows) for one in (lm, plain))
    wanted, why = free - _NEAR, "near what training-free heads of this model reach"
    stated = _stated_recall(info)
    if stated is not None and stated - _LOST > wanted:
        wanted, why = stated - _LOST, f"{_LOST} below the {stated:.3f} of their file"
    if ours < wanted:
        raise ConfigError(
            "forecast_base='same-architecture' is not allowed: the heads were trained "
            f"for the base model {info.get('base_name')!r}, and here they find "
            f"{ours:.3f} of the blocks; it must be at least {wanted:.3f}, {why}"
        )
    return ours


def _recall(lm: LanguageModel, sparse: Any, rows: np.ndarray) -> float:
    chosen = dataclasses.replace(lm, sparse=sparse)
    report = forecast_report(chosen, {"manual": rows}, about={})
    return float(report["domains"]["manual"]["means"]["recall"])


def _stated_recall(info: Mapping[str, Any]) -> float | None:
    extra = info.get("extra")
    held = extra.get("held_out") if isinstance(extra, dict) else None
    layers = held.get("recall") if isinstance(held, dict) else None
    if not isinstance(layers, list) or not layers:
        return None
    if not all(isinstance(x, int | float) for x in layers):
        return None
    return float(np.mean(layers))
