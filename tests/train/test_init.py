"""`init="regression"`: exact where the next layer's query is linear in what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from train.backbone import Batch, Settings
from train.config import LossConfig
from train.init import (
    Regression,
    combine,
    initial_heads,
    predictors,
    query_moments,
    regression_heads,
)
from train.metrics import make_evaluate
from train.sharding import make_mesh
from train.tiles import Documents

SPARSE = SparseConfig(local_blocks=1, block_budget=4)
LOSS = LossConfig(
    teacher="deployed",
    student="blocks",
    target="recall",
    mask_short_rows=True,
    floor=0.0,
    tile=320,
)


def _batches(count: int):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = jnp.asarray(rng.integers(0, 128, (1, 2, 640)), jnp.int32)
        rows = Documents.whole_rows(2, 640)
        yield Batch(tokens, Documents(rows.start[None], rows.end[None]))


def test_predictors_solve_least_squares():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6))
    true = rng.standard_normal((6, 4))
    y = x @ true
    found = predictors((x.T @ x)[None], (x.T @ y)[None])[0]
    np.testing.assert_allclose(found, true, atol=1e-3)
    guesses = jnp.asarray(rng.standard_normal((1, 6, 1, 2, 4)), jnp.float32)
    mean = combine(guesses, jnp.full((1, 1, 2, 1), 0.5))
    np.testing.assert_allclose(mean[0], guesses[0, :, 0].mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["tiny", pytest.param("tiny-moe", marks=[pytest.mark.slow, pytest.mark.long])],
)
def test_layer_0_finds_its_own_query_heads(random_model, name):
    """Layer 0 is forecast from its own input, of which its queries are linear."""
    model = random_model(name)
    config = model.config
    settings = Settings(config, SPARSE, LOSS, masked_attention=True)
    heads = initial_heads(model, "from_query", 0)
    batch = jax.tree.map(lambda x: x[0], next(_batches(1)))
    run = jax.jit(query_moments, static_argnames="settings")
    square, product = run(model, heads, batch, settings=settings)
    found = predictors(*(np.asarray(x, np.float64)[:1] for x in (square, product)))
    expected = model.layers.qkv[...][0][:, : config.num_heads * config.head_dim]
    np.testing.assert_allclose(found[0], expected, atol=5e-3)


@pytest.mark.slow
@pytest.mark.long  # exact where it can be: above
def test_regression_forecasts_better_than_from_query(random_model):
    model = random_model()
    settings = Settings(model.config, SPARSE, LOSS, masked_attention=True)
    mesh = make_mesh(1)
    first = initial_heads(model, "from_query", 0)
    heads, again = (
        regression_heads(Regression(model, first, _batches(6), settings, mesh, 3))
        for _ in range(2)
    )
    np.testing.assert_array_equal(heads, again)
    plain = dataclasses.replace(settings)
    evaluate = make_evaluate(model, plain, mesh, fsdp=False, mass=False)
    batch = [jax.tree.map(lambda x: x[0], next(_batches(1)))]
    before = evaluate(model, jnp.array(first), batch).recall
    after = evaluate(model, jnp.array(heads), batch).recall
    assert np.all(after[1:] > before[1:])
