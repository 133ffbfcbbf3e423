"""Weights in 8-bit integers: products, rounding, and whole models that decode so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.models.int8_weight import MOST_ROWS, int8_weight


@pytest.fixture(scope="module")
def weight():
    values = np.random.default_rng(0).standard_normal((96, 3001), np.float32)
    values[:, 7] = 0
    return jnp.asarray(values)


def test_rounding_is_within_half_a_step(weight):
    kept = int8_weight(weight)
    back = np.asarray(kept.values, np.float32) * np.asarray(kept.scale)[:, None]
    assert kept.values.dtype == jnp.int8 and kept.values.shape == (3001, 96)
    off = np.abs(back - np.asarray(weight).T)
    assert (off <= np.asarray(kept.scale)[:, None] * 0.5001).all()
    np.testing.assert_array_equal(back[7], 0)


@pytest.mark.parametrize("rows", [1, 5, MOST_ROWS])
def test_a_short_product_is_that_of_the_integers(weight, rows):
    """3,001 outputs are no whole number of blocks."""
    kept = int8_weight(weight)
    x = np.random.default_rng(rows).standard_normal((rows, 96), np.float32)
    back = np.asarray(kept.values, np.float64).T * np.asarray(kept.scale, np.float64)
    got = jax.jit(lambda kept, x: kept.product(x))(kept, jnp.asarray(x))
    np.testing.assert_allclose(got, x @ back, rtol=1e-4, atol=1e-4)


def test_a_long_product_is_that_of_the_weight(weight):
    x = jnp.ones((MOST_ROWS + 1, 96))
    np.testing.assert_array_equal(int8_weight(weight).product(x), x @ weight)


def test_some_outputs(weight):
    some = int8_weight(weight)[..., :40]
    x = jnp.ones((2, 96))
    np.testing.assert_allclose(some.product(x), x @ weight[:, :40], atol=0.3)
    assert some.full is not None and some.full.shape == (96, 40)


def test_a_model_decodes_near_itself():
    """A prefill longer than a short product's rows is that of the full weights."""
    exact, narrow = (
        sj.load("tiny", attention="sparda", forecast="from_query", weights=weights)
        for weights in (None, "int8")
    )
    assert "int8" in repr(narrow) and "int8" not in repr(exact)
    ids = list(range(2, 112))
    want, got = (np.asarray(sj.forward(lm, ids)) for lm in (exact, narrow))
    # The head reads integers, the layers do not.
    assert 0 < np.abs(got - want).max() < 0.01 * np.abs(want).max()
    short = ids[: MOST_ROWS // 2]
    want, got = (np.asarray(sj.forward(lm, short)) for lm in (exact, narrow))
    assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_a_stack_is_refused():
    with pytest.raises(sj.ConfigError, match=r"weights='int8'.*storage='stacked'"):
        sj.load("tiny", weights="int8", storage="stacked")


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(sj.ConfigError, match=r"weights='int8'.*'gpu'"):
        sj.load("tiny", weights="int8")


def test_a_mesh_is_refused():
    with pytest.raises(sj.ConfigError, match=r"weights='int8'.*mesh=.*not divided"):
        sj.load("tiny", weights="int8", mesh=sj.MeshConfig(model=2))
