"""Heads and models for other engines, read back."""

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import sparda_jax as sj
from sparda_jax.checkpoint.export import export_forecast_file, reference_tensors
from sparda_jax.checkpoint.forecast import (
    ForecastWeights,
    load_forecast,
    save_forecast,
)
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.torch_file import read_torch_file
from sparda_jax.cli import export
from sparda_jax.cli.main import main
from sparda_jax.config import SparseConfig
from sparda_jax.forecasts import Published
from sparda_jax.models.low_rank import LowRankHeads
from sparda_jax.models.weights import from_query_heads

SPARSE = SparseConfig(local_blocks=4, block_budget=12)


def _weights(config, dtype=np.float32, queries=1) -> ForecastWeights:
    rng = np.random.default_rng(0)
    size = config.num_kv_heads * queries * config.head_dim
    shape = (config.num_layers, size, config.hidden_size)
    values = rng.standard_normal(shape).astype(dtype).astype(np.float32)
    return ForecastWeights(values[1:], values[0], None, SPARSE, queries=queries)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_bit_equal(kit, tmp_path, suffix, dtype):
    wanted = _weights(kit.config, dtype)
    path = tmp_path / f"heads.{suffix}"
    export_forecast_file(path, wanted, base="a model")
    found = load_forecast(path, config=kit.config, fingerprint="f" * 64, sparse=SPARSE)
    np.testing.assert_array_equal(found.future, wanted.future)
    np.testing.assert_array_equal(found.current, wanted.current)
    if suffix == "pt":
        assert found.info["base_name"] == "a model"
        assert found.sparse is not None
        assert found.sparse.block_budget == SPARSE.block_budget
        state = read_torch_file(path)["model_state_dict"]
    else:
        with safe_open(path, "numpy") as file:
            state = {name: None for name in file.keys()}
    layers = range(kit.config.num_layers)
    names = {f"model.layers.{x}.self_attn.q_future_proj.weight" for x in layers}
    assert set(state) == names | {"model.layers.0.self_attn.q_curr_proj.weight"}
    held = reference_tensors(wanted)
    assert {x.dtype for x in held.values()} == {np.dtype(dtype)}


def test_several_queries_are_refused(kit, tmp_path):
    path = tmp_path / "heads.pt"
    with pytest.raises(sj.ConfigError, match="--queries 1"):
        export_forecast_file(path, _weights(kit.config, queries=2), base="m")
    with pytest.raises(sj.CheckpointError, match=r"end in \.safetensors"):
        export_forecast_file(tmp_path / "x.bin", _weights(kit.config), base="m")
    assert not list(tmp_path.iterdir())


def test_commands(kit, tmp_path, capsys):
    """A model with its heads, out and in again: the same logits."""
    config = kit.config
    base, heads, out = kit.exported(tmp_path, _weights(config))
    one = sj.load(base, attention="sparda", forecast=heads)
    other = sj.load(out, attention="sparda")
    for layer in range(config.num_layers):
        np.testing.assert_array_equal(
            one.model.forecast_head(layer), other.model.forecast_head(layer)
        )
    assert other.sparse.block_budget == SPARSE.block_budget
    np.testing.assert_array_equal(one.model.embedding[...], other.model.embedding[...])
    exported = tmp_path / "reference.pt"
    given = ["--model", str(base), "--forecast", str(heads), "--out", str(exported)]
    assert main(["export-forecast", *given]) == 0
    again = load_forecast(exported, config=config, fingerprint=None, sparse=None)
    np.testing.assert_array_equal(again.future, _weights(config).future)
    bare = ["--model", str(tmp_path / "base"), "--out", str(exported)]
    assert main(["export-forecast", *bare]) == 2
    assert "no heads are built in" in capsys.readouterr().err
    # Changes of the model's query weights become whole matrices.
    rng = np.random.default_rng(1)
    layers, hidden = config.num_layers, config.hidden_size
    outputs = config.num_kv_heads * config.head_dim
    shapes = ((layers, hidden), (layers, hidden, 3), (layers, 3, outputs))
    low = LowRankHeads(*(rng.standard_normal(x).astype(np.float32) for x in shapes))
    matrices = np.stack(low.whole(from_query_heads(one.model, 1))).swapaxes(1, 2)
    weights = ForecastWeights(
        matrices[1:], matrices[0], None, SPARSE, queries=1, low_rank=low
    )
    save_forecast(heads, weights, base_name="m")
    assert main(["export-forecast", *given]) == 0
    again = load_forecast(exported, config=config, fingerprint=None, sparse=None)
    np.testing.assert_array_equal(again.future, weights.future)


def test_heads_that_others_cannot_read(kit, tmp_path, capsys, monkeypatch):
    """Refused where they are asked for, left out where they come by themselves."""
    save_hf(tmp_path / "base", kit.config, kit.tensors(kit.config))
    heads = tmp_path / "heads.safetensors"
    save_forecast(heads, _weights(kit.config, queries=2), base_name="m")
    model = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    assert main(["export", *model, "--forecast", str(heads)]) == 2
    assert "make 2 queries for each kv head" in capsys.readouterr().err
    built_in = Published(
        str(heads), preset="m", kernel_size=32, kernel_stride=16, block_size=64
    )
    monkeypatch.setattr(export, "published_forecast", lambda _: built_in)
    assert main(["export-forecast", *model]) == 2
    assert "make 2 queries for each kv head" in capsys.readouterr().err
    assert main(["export", *model]) == 0
    told = capsys.readouterr()
    assert "are left out" in told.err and "without Forecast heads" in told.out
    assert sj.load(tmp_path / "out").model.forecast is None
