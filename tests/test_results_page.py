"""scripts/results_page.py: what it keeps, and an evaluation that goes on from it."""

import functools
import importlib.util
import json

import pytest
from doc_pages import ROOT

from sparda_jax.config import ConfigError
from sparda_jax.evaluation.report import read_report
from sparda_jax.evaluation.run_files import Cell, RunFiles

SETTINGS = {
    "format": 1,
    "model": "tiny",
    "attention": ["dense", "sparda"],
    "labels": {"dense": "dense", "sparda": "sparda"},
    "tasks": ["passkey"],
    "lengths": [2048],
    "floor": 50.0,
    "seed": 42,
    "samples": 2,
    "geometry": {"block_size": 64},
}
DENSE, SPARDA, TUPLE = (
    Cell("passkey", 2048, name, budget)
    for name, budget in (("dense", 0), ("sparda", 8), ("by_layer", 8))
)


@pytest.fixture(scope="module")
def page():
    """The script as a module."""
    place = ROOT / "scripts/results_page.py"
    spec = importlib.util.spec_from_file_location("results_page", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(folder, cells, *, failed=False, **settings):
    files = RunFiles(folder)
    files.begin(SETTINGS | settings)
    for cell, score in cells.items():
        record = {"score": score, "tokens": 5, "read": 0.25, "output": "text"}
        files.write_result(
            cell,
            [
                {"index": n, "prompt": f"hash{n}", **record}
                | ({"failed": "why"} if failed and n else {})
                for n in range(2)
            ],
        )
    return str(folder)


def _cell(number, change):
    """Damages the cell in a line of a file, counted from 0."""

    def damaged(lines):
        line = lines[number]
        value = json.dumps(change(json.loads(line.removesuffix(","))))
        return [*lines[:number], value + "," * line.endswith(","), *lines[number + 1 :]]

    return damaged


def test_an_evaluation_goes_on_from_what_was_kept(page, tmp_path):
    file, out = tmp_path / "kept.json", tmp_path / "out"
    page.take(file, [_write(tmp_path / "a", {DENSE: 100.0, SPARDA: 50.0})])
    page.begin(file, out)
    # The same settings are taken, and what is there is not run again.
    files = RunFiles(out)
    files.check(SETTINGS | {"task_files": {}})
    records = files.result(SPARDA)
    assert records is not None
    assert [(r["prompt"], r["score"]) for r in records] == [
        ("hash0", 50),
        ("hash1", 50),
    ]
    with pytest.raises(ConfigError, match="was begun with"):
        files.check(SETTINGS | {"task_files": {}, "geometry": {"block_size": 32}})
    before = file.read_text()
    page.take(file, [str(out)], add=True)
    assert file.read_text() == before and before.count("hash0") == 1
    with pytest.raises(ConfigError, match="is there already"):
        page.begin(file, out)
    with pytest.raises(ConfigError, match="is missing"):
        page.begin(tmp_path / "none.json", tmp_path / "other")


def test_budgets_by_layer_are_one_selectors_own(page, tmp_path):
    file = tmp_path / "kept.json"
    page.take(file, [_write(tmp_path / "a", {DENSE: 100.0, SPARDA: 50.0})])
    geometry = SETTINGS["geometry"] | {"layer_budgets": [4, 12]}
    more = {"attention": ["dense", "by_layer"], "geometry": geometry}
    labels = {"labels": {"dense": "dense", "by_layer": "sparda, budgets by layer"}}
    folder = _write(tmp_path / "b", {DENSE: 100.0, TUPLE: 100.0}, **more, **labels)
    page.take(file, [folder], add=True)
    kept = json.loads(file.read_text())
    assert kept["settings"]["geometry"] == SETTINGS["geometry"]
    assert "by_layer" in kept["settings"]["labels"]
    assert set(page.read(file).cells) == {DENSE, SPARDA, TUPLE}
    assert read_report(folder).settings["geometry"]["layer_budgets"] == [4, 12]
    other = _write(tmp_path / "c", {DENSE: 100.0}, geometry={"block_size": 32})
    with pytest.raises(ConfigError, match="no parts of one evaluation"):
        page.take(file, [other], add=True)


def test_scores_without_dense_have_a_table(page, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DATA", tmp_path)
    page.take(tmp_path / "x.json", [_write(tmp_path / "a", {SPARDA: 50.0})])
    assert "| sparda, 8 blocks | 50 [50, 50] | 50.0 [50.0, 50.0] |" in page.part(
        "x", 2048
    )
    page.take(tmp_path / "x.json", [_write(tmp_path / "b", {DENSE: 90.0})], add=True)
    assert "Without dense" not in page.part("x", 2048)


def test_the_overview_has_each_set_s_mean_and_a_dash(page, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DATA", tmp_path)
    columns = (("A", ("x", "y"), 2048, ("passkey",)), ("B", ("x",), 2048, ("passkey",)))
    monkeypatch.setattr(page, "_SIDE_BY_SIDE", columns)
    own = Cell("passkey", 2048, "infllm_v2", 16)
    first, second = {DENSE: 90.0, SPARDA: 50.0}, {DENSE: 80.0, SPARDA: 50.0, own: 70.0}
    variant = {TUPLE: 100.0}  # A selector of no name of its own stands in tables alone.
    named = {
        "attention": ["dense", "sparda", "infllm_v2"],
        "labels": SETTINGS["labels"],
    }
    page.take(tmp_path / "x.json", [_write(tmp_path / "a", first | variant)])
    page.take(tmp_path / "y.json", [_write(tmp_path / "b", second, **named)])
    assert page.overview().splitlines() == [
        "| attention | A: 50 % | A: 25 % | B: 25 % |",
        "|---|---|---|---|",
        "| `dense` | 90.0, 80.0² | 90.0, 80.0² | 90.0 |",
        "| `infllm_v2` | 70.0² | – | – |",
        "| `sparda` | – | 50.0 | 50.0 |",
    ]
    text = "<!-- overview -->\nold\n<!-- end of overview -->\n"
    assert page.filled(page.filled(text)) == page.filled(text) != text


def test_failed_samples_are_not_kept(page, tmp_path):
    folder = _write(tmp_path / "a", {DENSE: 0.0}, failed=True)
    with pytest.raises(ConfigError, match=r"samples \[1\] failed"):
        page.take(tmp_path / "kept.json", [folder])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["begin", "kept.json"], "begin is of a file and a directory, not of 1"),
        (["begin", "kept.json", "a", "b"], "a file and a directory, not of 3"),
        (["take"], "take is of a file and directories, not of 0"),
        (["add", "kept.json"], "add is of a file and directories, not of 1"),
        (["check", "kept.json"], "check is of no files, not of 1"),
    ],
)
def test_a_wrong_number_of_files_is_told(page, words, told, capsys):
    assert page.main(words) == 2
    assert told in capsys.readouterr().err


def _without(name, cell):
    return {key: value for key, value in cell.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda lines: lines[:-2], "is no valid JSON: Expecting"),
        (lambda lines: ["[]"], "is damaged: wanted what `take` writes"),
        (
            lambda lines: [lines[0].replace('"seed": 42, ', ""), *lines[1:]],
            "line 1: has no 'seed'",
        ),
        (_cell(3, lambda cell: 7), "line 4: is no object"),
        (_cell(3, lambda cell: cell | {"budget": "8"}), "line 4: budget='8'"),
        (_cell(3, lambda cell: cell | {"read": [0.25]}), "line 4: must have all of"),
        (_cell(3, lambda cell: cell | {"score": 50}), "line 4: 'score' must be a list"),
        (_cell(3, lambda cell: cell | {"score": [50, "x"]}), "line 4: score='x'"),
        (_cell(3, lambda cell: cell | {"prompts": ["a"]}), "line 4: has not the"),
        (_cell(2, lambda cell: cell | {"prompts": []}), "line 3: has not the prompts"),
        (_cell(2, functools.partial(_without, "tokens")), "line 3: has no 'tokens'"),
    ],
)
def test_a_damaged_file_is_told_in_a_line(page, damage, told, tmp_path, capsys):
    file, out = tmp_path / "kept.json", tmp_path / "out"
    page.take(file, [_write(tmp_path / "a", {DENSE: 100.0, SPARDA: 50.0})])
    file.write_text("\n".join(damage(file.read_text().split("\n"))))
    for words in (
        ["begin", str(file), str(out)],
        ["add", str(file), str(tmp_path / "a")],
    ):
        assert page.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line and told in line
    assert not out.exists()
