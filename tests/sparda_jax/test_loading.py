"""`load`: every kind of file gives the same model; Forecast weights are not guessed."""

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.forecast import ForecastWeights, save_forecast
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.layout import CURRENT, future_name
from sparda_jax.config import ConfigError
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.weights import random_tensors

CONFIG = PRESETS["tiny"].model
SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)


@pytest.fixture(scope="module")
def tensors():
    return {name: load() for name, load in random_tensors(CONFIG, seed=0).items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tensors):
    """The tiny preset's weights as a safetensors directory."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_hf(path, CONFIG, tensors)
    return path


@pytest.fixture(scope="module")
def forecast_arrays():
    rng = np.random.default_rng(7)
    shape = (CONFIG.num_kv_heads * CONFIG.head_dim, CONFIG.hidden_size)
    future = rng.standard_normal((CONFIG.num_layers - 1, *shape)).astype(np.float32)
    return future, rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(2, 128, 600)


def test_directory_is_the_preset(directory, ids):
    ours = sj.load("tiny", storage="stacked")
    theirs = sj.load(directory, storage="stacked")
    np.testing.assert_array_equal(sj.forward(ours, ids), sj.forward(theirs, ids))


def test_forecast_file_and_forecast_in_the_directory_agree(
    tmp_path, directory, tensors, forecast_arrays, ids
):
    future, current = forecast_arrays
    base = sj.load(directory)
    path = tmp_path / "heads.safetensors"
    weights = ForecastWeights(
        future=future,
        current=current,
        base_fingerprint=base.fingerprint,
        sparse=SPARSE,
        info={},
    )
    save_forecast(path, weights, base_name=CONFIG.name)
    whole = dict(tensors)
    for layer, matrix in enumerate(future):
        whole[future_name(layer)] = matrix
    whole[CURRENT] = current
    save_hf(tmp_path / "whole", CONFIG, whole)
    options = {"attention": "sparda", "sparse": SPARSE, "storage": "stacked"}
    from_file = sj.load(directory, forecast=path, **options)
    from_directory = sj.load(tmp_path / "whole", **options)
    from_query = sj.load(directory, forecast="from_query", **options)
    logits = [sj.forward(lm, ids) for lm in (from_file, from_directory, from_query)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(np.asarray(logits[0] - logits[2])).max() > 1e-4


def test_forecast_of_another_base_is_refused(tmp_path, directory, forecast_arrays):
    future, current = forecast_arrays
    path = tmp_path / "heads.safetensors"
    weights = ForecastWeights(
        future=future,
        current=current,
        base_fingerprint="0" * 64,
        sparse=SPARSE,
        info={},
    )
    save_forecast(path, weights, base_name="other")
    with pytest.raises(CheckpointError, match="0000"):
        sj.load(directory, attention="sparda", forecast=path, sparse=SPARSE)
    with pytest.raises(CheckpointError, match="0000"):
        sj.load("tiny", attention="sparda", forecast=path, sparse=SPARSE)


def test_sparda_without_weights_names_both_ways_out(directory):
    with pytest.raises(ConfigError, match=r"PATH.*forecast='from_query'"):
        sj.load(directory, attention="sparda")
    lm = sj.load(directory)
    with pytest.raises(ConfigError, match="from_query"):
        sj.with_attention(lm, "sparda")


def test_from_query_heads_are_group_means(tensors):
    lm = sj.load("tiny", attention="sparda", forecast="from_query")
    for layer in range(CONFIG.num_layers):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        shape = (CONFIG.num_kv_heads, -1, CONFIG.head_dim, CONFIG.hidden_size)
        mean = tensors[name].reshape(shape).mean(axis=1)
        expected = mean.reshape(-1, CONFIG.hidden_size).T
        np.testing.assert_allclose(
            lm.model.forecast_head(layer), expected, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention": "magic"}, "attention='magic'"),
        ({"forecast": "nowhere"}, "forecast='nowhere'"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ConfigError, match=named):
        sj.load("tiny", **arguments)


def test_selector_of_the_callers_own(ids):
    """Anything that scores blocks can select: here, the most recent ones."""
    import jax.numpy as jnp

    class Recent(sj.Selector):
        name = "recent"

        def score(self, tile, config, sparse, implementation):
            shape = (*tile.positions.shape, config.num_kv_heads, tile.num_blocks)
            ranks = jnp.arange(tile.num_blocks, dtype=jnp.float32)
            return jnp.swapaxes(jnp.broadcast_to(ranks, shape), 1, 2)

    selector = Recent()
    lm = sj.load("tiny", attention=selector, sparse=SPARSE, storage="stacked")
    dense = sj.load("tiny", storage="stacked")
    assert sj.forward(lm, ids).shape == (600, 128)
    few = sj.forward(lm, ids)[:300], sj.forward(dense, ids)[:300]
    np.testing.assert_allclose(*few, atol=2e-5, rtol=1e-5)


def test_with_attention_leaves_the_model_as_it_was():
    lm = sj.load("tiny", storage="stacked")
    headed = sj.with_attention(lm, "sparda", forecast="from_query")
    assert lm.model.forecast is None and headed.model.forecast is not None
    assert headed.model.embedding[...] is lm.model.embedding[...]
    again = sj.with_attention(headed, "sparda", forecast="from_query")
    assert again.model is not headed.model


def test_heads_for_another_geometry_are_refused_everywhere(
    tmp_path, directory, forecast_arrays
):
    future, current = forecast_arrays
    path = tmp_path / "heads.safetensors"
    save_forecast(
        path,
        ForecastWeights(future=future, current=current, sparse=SPARSE),
        base_name=CONFIG.name,
    )
    other = sj.SparseConfig(
        kernel_size=16, kernel_stride=8, local_blocks=2, block_budget=6
    )
    lm = sj.load(directory, sparse=SPARSE, forecast=path)
    assert lm.forecast_sparse == SPARSE
    named = r"SparseConfig.kernel_size=16.*trained for kernel_size=32"
    with pytest.raises(ConfigError, match=named):
        sj.with_attention(lm, "sparda", sparse=other)
    # An attention that does not forecast may have any geometry.
    dense = sj.with_attention(lm, "dense", sparse=other)
    with pytest.raises(ConfigError, match=named):
        sj.with_attention(dense, "sparda")
    free = sj.with_attention(dense, "sparda", forecast="from_query")
    assert free.forecast_sparse is None
    budget = sj.SparseConfig(local_blocks=1, block_budget=4)
    assert sj.with_attention(lm, "sparda", sparse=budget).sparse == budget
    # A guess of every head's query is scored as that is: by any windows.
    group = CONFIG.group_size
    every = ForecastWeights(
        future=np.repeat(future, group, axis=1),
        current=np.repeat(current, group, axis=0),
        sparse=SPARSE,
        queries=group,
    )
    save_forecast(path, every, base_name=CONFIG.name)
    lm = sj.load(directory, sparse=other, forecast=path, attention="sparda")
    assert (lm.sparse, lm.forecast_sparse) == (other, SPARSE)
