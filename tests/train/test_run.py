"""Whole runs of the tiny model: learning, resuming, bad input."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

import sparda_jax
from sparda_jax.checkpoint.forecast import load_forecast
from sparda_jax.checkpoint.hf import read_safetensors
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import random_tensors
from train import run as run_module
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.main import main
from train.metrics import RunLog, read_log
from train.run import TrainingError, train
from train.run_directory import hold_directory
from train.text import Corpus, save_corpus


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A corpus whose tokens repeat, so that there is something to attend to."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(520, 900, 40)
    words = rng.integers(0, 128, (16, 12))
    tokens = [
        np.concatenate([words[i] for i in rng.integers(0, 16, 80)])[:length]
        for length in lengths
    ]
    path = tmp_path_factory.mktemp("data") / "shards"
    whole = np.concatenate(tokens).astype(np.uint32)
    save_corpus(Corpus("words", (whole,), (np.cumsum(lengths),), 128), path)
    return path


@pytest.fixture(autouse=True)
def strong_weights(monkeypatch):
    """Random weights that are large enough for attention to prefer something."""
    monkeypatch.setattr(
        "sparda_jax.loading.random_tensors",
        lambda config, seed: random_tensors(config, seed, scale=0.2),
    )


def _config(shards, out, **changes) -> TrainConfig:
    fields = {
        "model": "tiny",
        "out": str(out),
        "sparse": SparseConfig(local_blocks=1, block_budget=4),
        "loss": LossConfig(mask_short_rows=True, tile=256),
        "optimizer": OptimizerConfig(lr=5e-3, steps=6, global_batch=2, micro_batch=2),
        "data": DataConfig(
            sources=((str(shards), 1.0),), seq_len=512, packing="long", held_out=0.2
        ),
        "eval": EvalConfig(every=6, batches=2),
        "checkpoint": CheckpointConfig(every=2),
    }
    return TrainConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of six steps that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sparda_jax.loading.random_tensors",
            lambda config, seed: random_tensors(config, seed, scale=0.2),
        )
        out = tmp_path_factory.mktemp("run")
        return out, train(_config(shards, out), progress=False)


@pytest.mark.slow
def test_a_run_leaves_everything_behind(finished):
    out, result = finished
    assert int(result.state.step) == 6 and result.resumed_from is None
    assert (out / "curves.png").stat().st_size > 10_000
    lines = read_log(out / "log.jsonl")
    assert [x["step"] for x in lines if x["kind"] == "train"] == list(range(1, 7))
    evaluations = [x for x in lines if x["kind"] == "eval"]
    assert [x["step"] for x in evaluations] == [0, 6]
    for line in evaluations:
        assert 0 <= line["recall"] <= 1
        assert line["forecast_mass"] <= line["oracle_mass"] + 1e-6 <= 1 + 1e-5
        assert len(line["layers"]["recall"]) == 3
    kept = sorted(int(x.name) for x in (out / "checkpoints").iterdir())
    assert kept == [4, 6]
    # The last one has the only evaluation after training, so it is the best one.
    last, best = (
        load_forecast(
            out / f"forecast{which}.safetensors",
            config=get_preset("tiny").model,
            fingerprint=None,
            sparse=None,
        )
        for which in ("", "-best")
    )
    np.testing.assert_array_equal(last.future, best.future)
    lm = sparda_jax.load(
        "tiny", attention="sparda", forecast=out / "forecast.safetensors"
    )
    heads = np.stack([lm.model.forecast_head(i) for i in range(3)])
    np.testing.assert_array_equal(heads, result.state.heads)


@pytest.mark.slow
@pytest.mark.long  # by `adapt`: `test_commands_for_your_own_model_run`
def test_the_regression_is_exported_where_no_step_beats_it(shards, tmp_path):
    """At a rate that is far too high; heads read behind attention, inputs are white."""
    config = _config(
        shards,
        tmp_path,
        init="regression",
        init_batches=2,
        queries=None,
        reads="attended",
        export_best=True,
        export_rank=8,
        optimizer=OptimizerConfig(lr=0.5, steps=2, global_batch=2, whiten=True),
        eval=EvalConfig(every=2, batches=2),
        checkpoint=CheckpointConfig(every=2, keep_last=1),
    )
    result = train(config, progress=False)
    assert int(result.state.step) == 0
    # It was written before the first step too.
    early = read_safetensors(tmp_path / "forecast-regression.safetensors")[0]
    best = read_safetensors(tmp_path / "forecast.safetensors")[0]
    assert early.keys() == best.keys()
    for name, tensor in best.items():
        np.testing.assert_array_equal(early[name](), tensor())
    again = train(config, progress=False)  # nothing is left to do
    assert again.resumed_from == 2 and int(again.state.step) == 0
    np.testing.assert_array_equal(again.state.heads, result.state.heads)
    lm = sparda_jax.load(
        "tiny", attention="sparda", forecast=tmp_path / "forecast.safetensors"
    )
    assert lm.config.forecast_reads == "attended" and lm.config.forecast_queries == 4
    heads = np.stack([lm.model.forecast_head(i) for i in range(3)])
    np.testing.assert_allclose(heads, result.state.heads, atol=1e-6)


@pytest.mark.slow
@pytest.mark.long  # the last one is, by `adapt`: `test_commands_for_your_own_…`
def test_the_best_checkpoint_is_kept_and_exported(shards, tmp_path):
    """Held-out recall falls at a rate that is far too high: an early one is best."""
    config = _config(
        shards,
        tmp_path,
        optimizer=OptimizerConfig(lr=0.5, steps=4, global_batch=2, micro_batch=2),
        eval=EvalConfig(every=1, batches=2, mass=False),
        checkpoint=CheckpointConfig(every=1, keep_last=1),
        export_dtype="bfloat16",
    )
    train(config, progress=False)
    lines = [x for x in read_log(tmp_path / "log.jsonl") if x["kind"] == "eval"]
    recall = {x["step"]: x["recall"] for x in lines if x["step"]}
    best = max(recall, key=lambda step: (recall[step], step))
    kept = sorted(int(x.name) for x in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({best, 4})
    tensors, metadata = read_safetensors(tmp_path / "forecast-best.safetensors")
    assert json.loads(metadata["extra"])["step"] == best
    assert all(load().dtype.name == "bfloat16" for load in tensors.values())


@pytest.mark.slow
def test_tensorboard_files_hold_the_log(finished, shards, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    log = RunLog(tmp_path, start=-1, steps=2, tensorboard=True, progress=False)
    log.write(1, "train", {"loss": 0.25, "layers": [1.0]})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"layers" not in content
    assert np.float32(0.25).tobytes() in content
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="needs the package tensorboardX"):
        RunLog(tmp_path, start=-1, steps=2, tensorboard=True, progress=False)


@pytest.mark.slow
@pytest.mark.long  # losses of steps fall: `test_frozen_means_frozen`
def test_loss_falls_and_recall_rises(shards, tmp_path):
    config = _config(
        shards,
        tmp_path,
        init="kaiming",
        optimizer=OptimizerConfig(lr=1e-2, steps=40, global_batch=2, micro_batch=2),
        eval=EvalConfig(every=40, batches=2, mass=False),
        checkpoint=CheckpointConfig(every=40),
    )
    train(config, progress=False)
    before, after = (x for x in read_log(tmp_path / "log.jsonl") if x["kind"] == "eval")
    assert after["kl"] < 0.95 * before["kl"]
    assert after["recall"] > before["recall"] + 0.05
    assert after["own_mass"] is None


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(finished, shards, tmp_path, monkeypatch):
    calls = []

    def report(config, log, step, metrics, rate, real=run_module._report):
        calls.append(step)
        if step == 5:
            raise KeyboardInterrupt
        real(config, log, step, metrics, rate)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_report", report)
        with pytest.raises(KeyboardInterrupt):
            train(_config(shards, tmp_path), progress=False)
    assert calls == [1, 2, 3, 4, 5]
    result = train(_config(shards, tmp_path), progress=False)
    assert result.resumed_from == 4
    out, whole = finished
    for a, b in zip(
        jax.tree.leaves(result.state), jax.tree.leaves(whole.state), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    names = ("step", "kind", "loss", "gradient_norm", "recall")

    def told(path):
        return [{n: x.get(n) for n in names} for x in read_log(path / "log.jsonl")]

    assert told(tmp_path) == told(out)
    for name in ("forecast.safetensors", "forecast-best.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
def test_other_runs_are_refused_and_nothing_is_damaged(finished, shards):
    out, _ = finished

    def files():
        return {
            p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()
        }

    before = files()
    exported = (out / "forecast.safetensors").read_bytes()
    # The same counts, and one other word.
    tokens = shards / "tokens-00000.npy"
    held = np.load(tokens)
    np.save(tokens, np.concatenate(([1 - min(held[0], 1)], held[1:])).astype("u2"))
    try:
        with pytest.raises(ConfigError, match=r"data\.0\.sha256 was '.*' now\. Cont"):
            train(_config(shards, out), progress=False)
    finally:
        np.save(tokens, held)
    changed = _config(shards, out, seed=7)
    with pytest.raises(ConfigError, match=r"config.seed was 42, and is 7 now"):
        train(changed, progress=False)
    model = _config(shards, out, model="tiny-nosa")
    with pytest.raises(ConfigError, match=r"model was 'tiny', and is 'tiny-nosa' now"):
        train(model, progress=False)
    assert files() == before
    # The run itself, whose steps are done, writes what it wrote.
    assert train(_config(shards, out), progress=False).resumed_from == 6
    assert (out / "forecast.safetensors").read_bytes() == exported
    # What may change: more logging, other devices, and the steps are done.
    free = _config(shards, out, log_every=3, eval=EvalConfig(every=3, batches=1))
    assert train(free, progress=False).resumed_from == 6


@pytest.mark.slow
@pytest.mark.long  # interrupted: above
def test_a_time_limit_ends_a_run_that_can_go_on(finished, shards, tmp_path):
    first = train(_config(shards, tmp_path, max_minutes=0.0), progress=False)
    assert int(first.state.step) == 1
    second = train(_config(shards, tmp_path), progress=False)
    assert second.resumed_from == 1
    np.testing.assert_array_equal(second.state.heads, finished[1].state.heads)


@pytest.mark.slow
def test_training_stops_when_nothing_is_finite(shards, tmp_path, monkeypatch):
    def broken(config, seed):
        tensors = random_tensors(config, seed)
        name = "model.layers.0.self_attn.q_proj.weight"
        return {**tensors, name: lambda: np.full((128, 64), np.nan, np.float32)}

    monkeypatch.setattr("sparda_jax.loading.random_tensors", broken)
    config = _config(
        shards,
        tmp_path,
        optimizer=OptimizerConfig(
            steps=20, global_batch=2, micro_batch=2, max_bad_steps=3
        ),
        data=dataclasses.replace(_config(shards, tmp_path).data, held_out=0.0),
    )
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row"):
        train(config, progress=False)
    assert read_log(tmp_path / "log.jsonl")[-1]["loss"] is None


def test_unwritable_directory_is_one_clear_error(shards, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="a directory that can be written to"):
        train(_config(shards, blocked / "run"), progress=False)
    with (
        hold_directory(tmp_path),
        pytest.raises(ConfigError, match="no other trainer runs, and process"),
    ):
        train(_config(shards, tmp_path), progress=False)


def test_an_interrupted_command_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.main.train", interrupted)
    path = tmp_path / "run.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    assert main(["--config", str(path)]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparda: interrupted: the checkpoints are whole")


def test_command_line(shards, tmp_path, capsys):
    path = tmp_path / "run.py"
    path.write_text(
        "from train.config import *\n"
        "def get_config():\n"
        "    return TrainConfig(model='tiny', optimizer=OptimizerConfig(steps=2))\n"
    )
    assert main(["--config", str(path), "--set", "lr=1e-3", "steps=3", "--print"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optimizer"]["lr"] == 1e-3 and shown["optimizer"]["steps"] == 3
    assert main(["--config", str(tmp_path / "no.py")]) == 2
    assert "must be a Python file with get_config()" in capsys.readouterr().err
    out = str(tmp_path / "out")
    arguments = ["--config", str(path), "--quiet", "--set", f"out={out}"]
    assert main(arguments) == 2
    assert "the model has no tokenizer" in capsys.readouterr().err
