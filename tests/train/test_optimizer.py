"""The optimizer on whitened inputs, and what older runs know of the newer options."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparda_jax as sj
from train.config import LossConfig, OptimizerConfig, TrainConfig
from train.optimizer import initial_state, make_optimizer, whitened, with_inputs


def test_whitened_descent_is_newtons():
    """Plain descent inside goes along the inverse of the inputs' moments."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 400, 6)) * np.geomspace(5, 0.2, 6)
    square = np.einsum("ltd,lte->lde", inputs, inputs)
    gradient = rng.standard_normal((2, 6, 3)).astype(np.float32)
    optimizer = whitened(optax.sgd(1.0))
    plain = optimizer.init(jnp.zeros((2, 6, 3)))
    moved, _ = optimizer.update(jnp.asarray(gradient), plain)
    np.testing.assert_allclose(moved, -gradient, rtol=1e-6)  # no inputs are known yet
    moved, after = optimizer.update(jnp.asarray(gradient), with_inputs(plain, square))
    for layer in range(2):
        size = np.trace(square[layer]) / 6
        normal = square[layer] / size + 1e-3 * np.eye(6)
        wanted = -np.linalg.solve(normal, gradient[layer])
        np.testing.assert_allclose(moved[layer], wanted, rtol=1e-4)
    assert after.root.shape == (2, 6, 6)


def test_white_inputs_change_nothing():
    """Where inputs are white already, it is AdamW."""
    heads = jnp.asarray(
        np.random.default_rng(1).standard_normal((1, 4, 3)), jnp.float32
    )
    gradient = jnp.linspace(-1, 1, 12).reshape(1, 4, 3)
    results = []
    for whiten in (False, True):
        optimizer = make_optimizer(OptimizerConfig(lr=1e-2, whiten=whiten))
        state = initial_state(heads, optimizer).optimizer
        updates, _ = optimizer.update(gradient, state, heads)
        results.append(updates)
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_options_of_later_versions_leave_older_runs_theirs():
    old = TrainConfig().identity()
    assert "reads" not in old and "softness" not in old["loss"]
    assert "whiten" not in old["optimizer"] and "export_best" not in old
    assert old["sparse"] is None
    sparse = sj.SparseConfig()
    assert "compressed_keys" not in TrainConfig(sparse=sparse).identity()["sparse"]
    sparse = dataclasses.replace(sparse, compressed_keys="int8")
    new = TrainConfig(sparse=sparse).identity()
    assert new["sparse"]["compressed_keys"] == "int8"
    new = TrainConfig(
        init="regression",
        reads="attended",
        loss=LossConfig(softness=0.03),
        optimizer=OptimizerConfig(whiten=True),
    ).identity()
    assert new["reads"] == "attended" and new["loss"]["softness"] == 0.03
    assert new["optimizer"]["whiten"] is True
    with pytest.raises(sj.ConfigError, match="whiten=True is not allowed"):
        TrainConfig(optimizer=OptimizerConfig(whiten=True))
