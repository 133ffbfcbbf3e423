"""Damaged files of an evaluation: one line that names file, line and field."""

import json

import numpy as np
import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.cli.main import main
from sparda_jax.config import ConfigError
from sparda_jax.evaluation.report import read_report, write_report
from sparda_jax.evaluation.run_files import Cell, RunFiles
from sparda_jax.evaluation.samples import Asked, Sample

SETTINGS = {
    "format": 1,
    "model": "tiny",
    "attention": ["dense"],
    "labels": {"dense": "Dense"},
    "tasks": ["passkey", "novel"],
    "task_files": {"novel": "0123"},
    "lengths": [100],
    "devices": ["cpu"],
    "commits": [],
    "floor": 50,
    "seed": 2**32 - 1,
    "samples": 1,
    "geometry": {"block_size": 16, "local_blocks": 2, "layer_budgets": [4] * 30},
}
SCORED = {
    "index": 0,
    "prompt_tokens": 90,
    "prompt": "ab",
    "depth": 0.5,
    "score": 100.0,
    "output": "1",
    "outputs": ["1"],
    "tokens": 1,
    "finish": "stop",
    "read": None,
}
SURPRISED = {
    "index": 0,
    "prompt": "ab",
    "surprise": 900.0,  # of a broken model: its exponential is too large
    "by_position": [1.0, 2.0, 3.0, 4.0],
    "likeliest": 10.0,
}
SCORES, SURPRISES = (Cell(t, 100, "dense", 0) for t in ("passkey", "novel"))


@pytest.fixture
def files(tmp_path):
    files = RunFiles(tmp_path)
    files.begin(SETTINGS)
    files.write_result(SCORES, [SCORED])
    files.write_result(SURPRISES, [SURPRISED])
    return files


def test_what_is_whole_is_read(files):
    report = read_report(files.folder)
    write_report(report)
    assert "inf [inf, inf]" in report.markdown()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score", "100"),
        ("score", [1]),
        ("score", float("nan")),
        ("score", float("inf")),
        ("tokens", [1]),
        ("read", [1]),
        ("depth", "0.5"),
        ("task", ["passkey"]),
        ("length", [100]),
        ("length", float("nan")),
        ("attention", ["dense"]),
        ("budget", [0]),
        ("prompt", ["ab"]),
        ("prompt", {}),
        ("output", 1),
        ("index", None),
        ("by_position", [1.0]),
        ("unknown", [float("nan")]),
    ],
)
def test_damaged_rows(files, capsys, field, value):
    path = files.folder / "results" / SCORES.name
    good = json.dumps({**SCORED, **vars(SCORES)})
    bad = json.dumps({**json.loads(good), field: value}).replace("Infinity", "1e400")
    path.write_text(f"{good}\n{bad}\n")
    assert main(["report", str(files.folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: line 2: " in line and field in line


def test_lost_samples_are_no_smaller_mean(files, capsys):
    """A file cut off between two lines is valid JSON Lines."""
    ids = np.arange(3, dtype=np.int32)
    asked = [Asked(Sample(n, "a", ("b",)), [ids]) for n in range(2)]
    files.write_samples("passkey", 100, asked)
    assert main(["report", str(files.folder)]) == 2
    assert "holds 1 records of 2 samples" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="makes it anew"):
        files.result(SCORES)
    files.write_result(SCORES, [SCORED, {**SCORED, "index": 1}])
    assert len(files.cells()[SCORES]) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "has no 'task'"),
        (json.dumps({**vars(SCORES), "index": 0}), "none of score"),
        (json.dumps({**SCORED, **vars(SURPRISES)}), "holds 'novel-100-dense.jsonl'"),
        ("\n", "is empty"),
    ],
)
def test_rows_of_nothing_or_of_another_cell(files, text, named):
    (files.folder / "results" / SCORES.name).write_text(text)
    for read in (files.cells, lambda: files.result(SCORES)):
        with pytest.raises(CheckpointError, match=named):
            read()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ["Dense"]),
        ("labels", {"dense": ["Dense"]}),
        ("floor", [50]),
        ("floor", float("nan")),
        ("format", 2),
        ("format", None),
        ("attention", "dense"),
        ("tasks", {"a": 1}),
        ("model", 3),
        ("geometry", []),
        ("geometry", {"a": float("nan")}),
        ("task_files", {"novel": 3}),
    ],
)
def test_damaged_settings(files, capsys, field, value):
    path = files.folder / "run.json"
    path.write_text(json.dumps({**SETTINGS, field: value}))
    assert main(["report", str(files.folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: " in line and field in line
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"run\.json: has no 'format'"):
        files.check(SETTINGS)


def _asked():
    ids = [np.arange(3, dtype=np.int32)]
    return [Asked(Sample(n, "text", ("1",)), ids) for n in range(2)]


def test_damaged_samples(files):
    files.write_samples("passkey", 100, _asked())
    assert len(files.samples("passkey", 100)) == 2
    arrays = files.folder / "samples" / "passkey-100.npz"
    whole = arrays.read_bytes()
    broken = whole.replace(b"PK\x03\x04", b"PK\x03\x05")
    for content in (b"", b"garbage", whole[:-20], whole[:40], broken):
        arrays.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"100\.npz: is damaged") as refusal:
            files.samples("passkey", 100)
        assert "\n" not in str(refusal.value)
    for given in (
        {"tokens": np.arange(6)},
        {"tokens": np.arange(6), "counts": np.array([3, 4])},
        {"tokens": np.arange(6), "counts": np.array([6])},
        {"tokens": np.arange(6), "counts": np.array([7, -1])},
        {"tokens": np.ones(6), "counts": np.array([3, 3])},
    ):
        np.savez(arrays, **given)
        with pytest.raises(CheckpointError, match=r"100\.npz: is damaged"):
            files.samples("passkey", 100)
    arrays.write_bytes(whole)
    rows = files.folder / "samples" / "passkey-100.jsonl"
    for text in ('{"index": 0}', '{"index": 0, "input": 3, "outputs": []}'):
        rows.write_text(text)
        with pytest.raises(CheckpointError, match="line 1: "):
            files.samples("passkey", 100)
    reference = files.folder / "reference" / "agreement-100.npz"
    for content in (b"", b"garbage"):
        reference.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"100\.npz: is damaged"):
            files.reference("agreement", 100)


def test_what_differs_is_named(files):
    geometry = SETTINGS["geometry"]
    other = {**SETTINGS, "geometry": {**geometry, "local_blocks": 3}}
    with pytest.raises(ConfigError, match="local_blocks=2, and this run has 3:"):
        files.check(other)
    budgets = [*[4] * 20, 5, *[4] * 9]
    other = {**SETTINGS, "geometry": {**geometry, "layer_budgets": budgets}}
    with pytest.raises(ConfigError, match=r"layer_budgets\[20\]=4, and this run has 5"):
        files.check(other)


def test_a_changed_task_file_is_refused(files):
    files.check({**SETTINGS, "task_files": {"another": "4567"}})
    with pytest.raises(ConfigError, match="another content of the task file 'novel'"):
        files.check({**SETTINGS, "task_files": {"novel": "4567"}})


def test_results_are_valid_json(files):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_result(SCORES, [{**SCORED, "score": float("nan")}])
    assert files.result(SCORES) == [{**vars(SCORES), **SCORED}]
