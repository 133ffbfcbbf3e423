import dataclasses
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.forecast import (
    ForecastWeights,
    forecast_sparse,
    load_forecast,
    save_forecast,
)
from sparda_jax.config import ModelConfig, SparseConfig

REAL = pathlib.Path(__file__).parents[2] / "goldens" / "torch_forecast_tiny.pt"
SPARSE = SparseConfig(local_blocks=4, block_budget=12)


@pytest.fixture
def torch_config() -> ModelConfig:
    """The base model of the real torch file, see test_torch_file."""
    return ModelConfig(
        name="base",
        vocab_size=10,
        hidden_size=16,
        ffn_size=8,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_context=64,
    )


def weights(config: ModelConfig, **changes) -> ForecastWeights:
    rng = np.random.default_rng(0)
    shape = (config.num_kv_heads * config.head_dim, config.hidden_size)
    future = rng.standard_normal((config.num_layers - 1, *shape)).astype(np.float32)
    current = rng.standard_normal(shape).astype(np.float32)
    held = ForecastWeights(future, current, "f" * 64, SPARSE)
    return dataclasses.replace(held, **changes)


@pytest.fixture
def saved(kit):
    path = kit.folder / "forecast.safetensors"
    save_forecast(
        path, weights(kit.config), base_name="tiny", extra={"steps": 2000, "lr": 5e-4}
    )
    return path


def test_older_versions_know_all_that_a_file_says_of_the_selection(kit, saved):
    """They refuse a field that they do not know, even one that changes nothing."""
    with safetensors.safe_open(saved, "numpy") as file:
        stated = json.loads(file.metadata()["sparse_config"])
    assert stated == SPARSE.to_json() and "compressed_keys" not in stated
    narrow = dataclasses.replace(SPARSE, compressed_keys="int8")
    save_forecast(saved, weights(kit.config, sparse=narrow), base_name="tiny")
    found = load_forecast(saved, config=kit.config, fingerprint="f" * 64, sparse=narrow)
    assert found.sparse == narrow


def test_budgets_by_layer_are_read_again(kit, saved):
    by_layer = dataclasses.replace(SPARSE, block_budget=(96, 40, 64))
    save_forecast(saved, weights(kit.config, sparse=by_layer), base_name="tiny")
    found = load_forecast(saved, config=kit.config, fingerprint=None, sparse=None)
    assert found.sparse == by_layer == forecast_sparse(saved)


def test_round_trip(kit, saved):
    found = load_forecast(saved, config=kit.config, fingerprint="f" * 64, sparse=SPARSE)
    wanted = weights(kit.config)
    np.testing.assert_array_equal(found.future, wanted.future)
    np.testing.assert_array_equal(found.current, wanted.current)
    assert found.future.dtype == found.current.dtype == np.float32
    assert (found.base_fingerprint, found.sparse) == ("f" * 64, SPARSE)
    assert found.info["base_name"] == "tiny"
    assert found.info["extra"] == {"steps": 2000, "lr": 5e-4}
    assert [p.name for p in kit.folder.iterdir()] == [saved.name]


def test_names_in_the_file(kit, saved):
    """The names and metadata are the format: others read them."""
    with safetensors.safe_open(saved, "numpy") as file:
        assert set(file.keys()) == {layout.future_name(0), layout.CURRENT}
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("sparda-forecast", "1")
    assert metadata["base_fingerprint"] == "f" * 64
    assert json.loads(metadata["sparse_config"]) == SPARSE.to_json()


def test_without_fingerprint_and_sparse(kit):
    path = kit.folder / "x.safetensors"
    held = weights(kit.config, base_fingerprint=None, sparse=None)
    save_forecast(path, held, base_name="tiny")
    found = load_forecast(path, config=kit.config, fingerprint="a" * 64, sparse=SPARSE)
    assert found.base_fingerprint is None and found.sparse is None
    load_forecast(path, config=kit.config, fingerprint=None, sparse=None)


def test_wrong_base(kit, saved):
    with pytest.raises(CheckpointError, match=r"'tiny'.*fffff.*eeee") as error:
        load_forecast(saved, config=kit.config, fingerprint="e" * 64, sparse=SPARSE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 128}, "block_size = 64, and block_size = 128 is asked for"),
        ({"kernel_size": 16, "kernel_stride": 8}, "kernel_size = 32.*kernel_size = 16"),
    ],
)
def test_other_geometry(kit, saved, changes, message):
    asked = dataclasses.replace(SPARSE, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_forecast(saved, config=kit.config, fingerprint=None, sparse=asked)


def test_other_budget_is_fine(kit, saved):
    asked = SparseConfig(local_blocks=8, block_budget=40, init_blocks=2, dense_len=100)
    load_forecast(saved, config=kit.config, fingerprint=None, sparse=asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"\[16, 32\], wanted \[16, 64\]"),
        ({"num_layers": 3}, r"q_future_proj.weight of shape .* is missing"),
        ({"num_layers": 1}, "is of layer|allowed"),
        ({"num_kv_heads": 4}, r"\[16, 32\], wanted \[32, 32\]"),
    ],
)
def test_other_shape(kit, saved, changes, message):
    config = dataclasses.replace(kit.config, **changes)
    if "num_layers" in changes and changes["num_layers"] == 1:
        # A file for two layers holds layer 0's, which is then the unused last one.
        found = load_forecast(saved, config=config, fingerprint=None, sparse=None)
        assert found.future.shape == (0, 16, 32)
        return
    with pytest.raises(CheckpointError, match=message):
        load_forecast(saved, config=config, fingerprint=None, sparse=None)


def _rewrite(path, change, **metadata):
    with safetensors.safe_open(path, "numpy") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}
        old = file.metadata()
    change(held)
    safetensors.numpy.save_file(held, path, old | metadata)


def test_last_layer_is_dropped(kit, saved):
    extra = np.ones((16, 32), np.float32)
    _rewrite(saved, lambda held: held.update({layout.future_name(1): extra}))
    found = load_forecast(saved, config=kit.config, fingerprint=None, sparse=None)
    assert found.future.shape == (1, 16, 32)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.norm.weight", np.ones(2, "f4"), "model.norm.weight' is no Forecast"),
        (layout.CURRENT, None, "q_curr_proj.weight of shape .* is missing"),
        (layout.CURRENT, np.full((16, 32), np.nan, "f4"), "not finite"),
        (layout.future_name(2), np.ones((16, 32), "f4"), "of layer 2, allowed"),
        (
            "layers.0.self_attn.q_curr_proj.weight",
            np.ones((16, 32), "f4"),
            "are the same one",
        ),
        (
            layout.CURRENT.replace("layers.0", "layers.1"),
            np.ones((16, 32), "f4"),
            "q_curr_proj: layers 0 to 0",
        ),
    ],
)
def test_damaged_tensors(kit, saved, name, array, message):
    def change(held):
        held.pop(name, None)
        if array is not None:
            held[name] = array

    _rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load_forecast(saved, config=kit.config, fingerprint=None, sparse=None)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "tf"}, "metadata format = 'tf', allowed: 'sparda-forecast'"),
        ({"version": "4"}, "metadata version = '4', allowed: '1', '2', '3'"),
        ({"version": "2"}, "metadata queries = None, allowed: a number"),
        ({"sparse_config": "{"}, "metadata sparse_config is no JSON"),
        ({"sparse_config": "[1]"}, "metadata sparse_config holds"),
        ({"sparse_config": '{"new_field": 1}'}, "new_field"),
        ({"sparse_config": '{"block_size": "64"}'}, "sparse_config.block_size = '64'"),
        ({"sparse_config": '{"block_size": true}'}, "sparse_config.block_size = True"),
        ({"sparse_config": '{"block_size": -1}'}, "block_size=-1"),
        ({"sparse_config": '{"block_budget": [96, true]}'}, r"block_budget\[1\]=True"),
        ({"sparse_config": '{"block_budget": []}'}, r"block_budget=\(\) is not"),
        ({"extra": "["}, "metadata extra is no JSON"),
    ],
)
def test_damaged_metadata(kit, saved, metadata, message):
    _rewrite(saved, lambda held: None, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load_forecast(saved, config=kit.config, fingerprint=None, sparse=SPARSE)


def test_no_file(kit):
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            load_forecast(
                kit.folder / name, config=kit.config, fingerprint=None, sparse=None
            )
    path = kit.folder / "empty.safetensors"
    save_forecast(path, weights(kit.config), base_name="x")
    _rewrite(path, lambda held: held.clear())
    with pytest.raises(CheckpointError, match="holds no Forecast tensor"):
        load_forecast(path, config=kit.config, fingerprint=None, sparse=None)


def test_nothing_is_left_of_a_failed_write(kit, saved, monkeypatch):
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match=r"allowed: \[L-1, K·R·H, D\]"):
        wrong = weights(kit.config, current=np.ones((2, 2), np.float32))
        save_forecast(saved, wrong, base_name="x")
    with pytest.raises(CheckpointError, match="extra is not JSON"):
        save_forecast(saved, weights(kit.config), base_name="x", extra={"a": object()})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_forecast(saved, weights(kit.config), base_name="x")
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        save_forecast(
            kit.folder / "no" / "x.safetensors", weights(kit.config), base_name="x"
        )
    assert [p.name for p in kit.folder.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


@pytest.mark.parametrize("name", ["torch_forecast_tiny.pt", "weights"])
def test_reference_checkpoint(torch_config, tmp_path, name):
    """By its name, or by its first bytes."""
    path = tmp_path / name
    path.write_bytes(REAL.read_bytes())
    asked = SparseConfig(block_budget=50)
    found = load_forecast(path, config=torch_config, fingerprint="a", sparse=asked)
    grid = np.arange(128, dtype=np.float32).reshape(8, 16)
    np.testing.assert_array_equal(found.future, [grid, grid + 1])
    np.testing.assert_array_equal(found.current, -grid)
    assert found.base_fingerprint is None
    assert found.sparse == SparseConfig(dense_len=8192)
    assert found.info["step"] == 2000
    assert found.info["base_name"] == "openbmb/MiniCPM4.1-8B"
    assert found.info["ignored_sparse_keys"] == ("training_kernel_size",)


def test_reference_checkpoint_for_another_model(torch_config):
    other = dataclasses.replace(torch_config, head_dim=8)
    with pytest.raises(CheckpointError, match=r"\[8, 16\], wanted \[16, 16\]"):
        load_forecast(REAL, config=other, fingerprint=None, sparse=None)
    asked = SparseConfig(block_size=128)
    with pytest.raises(CheckpointError, match="block_size = 64, and block_size = 128"):
        load_forecast(REAL, config=torch_config, fingerprint=None, sparse=asked)
