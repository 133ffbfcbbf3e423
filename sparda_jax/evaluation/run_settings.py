"""What `run.json` says of the model, the code and the machine of an evaluation."""

import datetime
import hashlib
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.run_checks import FORMAT
from sparda_jax.evaluation.samples import Prompts
from sparda_jax.sparse.selectors import Selector


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this package is in, None if it is in none."""
    folder = str(pathlib.Path(__file__).parent)
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of the checkout, with a plus if its files are not that commit's."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _forecast_of(lm: LanguageModel) -> str:
    """A short hash of the Forecast heads; "none" without them."""
    if lm.model.forecast is None:
        return "none"
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(lm.model.forecast):
        digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()[:12]


def run_settings(
    lm: LanguageModel,
    prompts: Prompts,
    selectors: Sequence[Selector],
    commit: str | None,
) -> dict[str, Any]:
    """What `run.json` says of the model, the code and the machine.

    Args:
      lm: The model.
      prompts: Its way to token ids.
      selectors: Those that run.
      commit: Which state of the code this is; None asks git.
    """
    assert lm.tokenizer is not None
    tokenizer = hashlib.sha256(lm.tokenizer.to_json().encode()).hexdigest()[:12]
    geometry = lm.sparse.to_json()
    budget = geometry.pop("block_budget")
    if not isinstance(budget, int):
        geometry["layer_budgets"] = list(budget)
    commit = commit or _commit()
    return {
        "format": FORMAT,
        "model": lm.config.name,
        "weights": lm.fingerprint,
        "forecast": _forecast_of(lm),
        "forecast_trained": lm.forecast_sparse is not None,
        "tokenizer": f"{lm.config.name}, {lm.tokenizer.vocab_size} tokens, {tokenizer}",
        "prompts": prompts.form,
        "dtype": lm.model.numbers,
        "storage": lm.model.storage,
        "cache": lm.cache.kind,
        "geometry": geometry,
        "attention": [selector.name for selector in selectors],
        "labels": {
            selector.name: getattr(selector, "label", selector.name)
            for selector in selectors
        },
        "devices": [jax.devices()[0].device_kind],
        "commits": [commit] if commit else [],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
