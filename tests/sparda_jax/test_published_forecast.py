"""Published Forecast weights: found by the base model's hash, loaded by default."""

import json

import numpy as np

import sparda_jax as sj
from sparda_jax.checkpoint.forecast import load_forecast
from sparda_jax.forecasts import PUBLISHED, published_forecast
from sparda_jax.models.presets import get_preset


def test_published_files_fit_their_presets():
    (fingerprint,) = PUBLISHED
    published = published_forecast(fingerprint)
    assert published is not None
    preset = get_preset("smollm2-135m")
    assert published.fits(preset.sparse) and not published.fits(sj.SparseConfig())
    held = load_forecast(
        published.path,
        config=preset.model,
        fingerprint=fingerprint,
        sparse=preset.sparse,
    )
    assert held.base_fingerprint == fingerprint
    assert held.future.shape == (29, 192, 576)
    # Trained: no two layers share a matrix, and the file says by which steps.
    assert np.all(np.std(held.future, axis=(1, 2)) > 0)
    assert json.loads(json.dumps(held.info["extra"]))["step"] == 160
    assert published_forecast("0" * 64) is None and published_forecast(None) is None
