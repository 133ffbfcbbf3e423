"""Two measurements of one thing: the trainer's and the Forecast report's."""

import argparse
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.evaluation.forecast_report import forecast_report
from sparda_jax.models.weights import from_query_heads
from train.backbone import Batch, Settings
from train.config import DataConfig, LossConfig, TrainConfig
from train.metrics import make_evaluate
from train.report import report
from train.sharding import make_mesh
from train.tiles import Documents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "reads"),
    [("tiny", "input"), ("tiny-nosa", "input"), ("tiny", "attended")],
)
def test_trainer_and_report_agree(model, reads):
    sparse = SparseConfig(local_blocks=2, block_budget=8, query_blocks=3)
    lm = sj.load(
        model,
        attention="sparda",
        forecast="from_query",
        dtype="float32",
        storage="stacked",
        sparse=sparse,
    )
    decoder = lm.model.with_forecast(from_query_heads(lm.model), reads)
    lm = dataclasses.replace(lm, model=decoder, config=decoder.config)
    rows = np.random.default_rng(0).integers(2, 128, (2, 1024))
    report = forecast_report(lm, {"random": rows}, about={})
    layers = report["domains"]["random"]["layers"]
    evaluate = make_evaluate(
        lm.model,
        Settings(lm.config, lm.sparse, LossConfig()),
        make_mesh(1),
        fsdp=False,
        mass=True,
    )
    assert lm.model.forecast is not None
    batch = Batch(jnp.asarray(rows), Documents.whole_rows(2, 1024))
    found = evaluate(lm.model, lm.model.forecast[...], [batch]).by_layer()
    for name in ("recall", "recall_at_budget", "forecast_mass", "own_mass"):
        np.testing.assert_allclose(layers[name], found[name], atol=2e-5, err_msg=name)
    if model == "tiny":
        # NOSA's oracle knows no second stage in one of them.
        np.testing.assert_allclose(
            layers["oracle_mass"], found["oracle_mass"], atol=2e-5
        )


def test_a_source_that_cannot_be_read_is_not_left_out():
    data = DataConfig(sources=(("nowhere", 1.0),), seq_len=512)
    options = argparse.Namespace(
        heads=[], unseen=[], rows=1, batch=1, perplexity=0, out=None
    )
    with pytest.raises(ConfigError, match="'nowhere' is text, and the model has no"):
        report(TrainConfig(model="tiny", data=data), options)
