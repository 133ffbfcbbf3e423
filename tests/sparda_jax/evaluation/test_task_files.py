"""Files of RULER, SCBench and LongBench v2, and texts: read, or refused by line."""

import json
import math

import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from sparda_jax.evaluation.task_files import read_task_file

RULER = {
    "index": 0,
    "input": "A text with 77 in it. Which number?",
    "outputs": ["77"],
    "length": 40,
    "answer_prefix": " The number is",
    "token_position_answer": 12,
}
SCBENCH = {
    "context": '{"a": "1", "b": "2"}',
    "multi_turns": [{"input": "a?", "answer": "1"}, {"input": "b?", "answer": "2"}],
}
LONGBENCH = {
    "_id": "x",
    "context": "word " * 300,
    "question": "What?",
    "choice_A": "one",
    "choice_B": "two",
    "choice_C": "three",
    "choice_D": "four",
    "answer": "C",
}


def _write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_ruler_rows(tmp_path, prompts):
    task = read_task_file(_write(tmp_path, "vt.jsonl", _jsonl(RULER, RULER)))
    assert task.name == "file_vt"  # not the name of a task of ours
    two = task.samples(prompts, length=400, count=5, seed=0)
    assert len(two) == 2
    row = two[0].row()
    assert {key: row[key] for key in ("input", "outputs", "answer_prefix")} == {
        "input": RULER["input"],
        "outputs": ("77",),
        "answer_prefix": " The number is",
    }
    assert two[0].token_position_answer == RULER["input"].index("77")
    with pytest.raises(ConfigError, match=r"lengths=50 .*line 1 needs \d+ tokens"):
        task.samples(prompts, length=50, count=1, seed=0)


def test_scbench_rows(tmp_path, prompts):
    task = read_task_file(_write(tmp_path, "kv.jsonl", _jsonl(SCBENCH)))
    assert task.kind == "fork"
    (sample,) = task.samples(prompts, length=400, count=1, seed=0)
    assert [q.outputs for q in sample.questions] == [("1",), ("2",)]
    assert sample.input == SCBENCH["context"]


def test_longbench_rows_lose_their_middle(tmp_path, prompts):
    row = {**LONGBENCH, "context": "begin " + LONGBENCH["context"]}
    task = read_task_file(_write(tmp_path, "lb.json", json.dumps([row])))
    (sample,) = task.samples(prompts, length=700, count=1, seed=0)
    assert sample.outputs == ("C",) and sample.length <= 700
    assert sample.input.startswith("begin ")
    assert sample.input.endswith('"The correct answer is (X)".')
    (whole,) = task.samples(prompts, length=4000, count=1, seed=0)
    assert row["context"] in whole.input and "(C) three" in whole.input


def test_a_text_is_cut_into_pieces(tmp_path, prompts):
    text = "".join(f"{n} " for n in range(1000))
    task = read_task_file(_write(tmp_path, "novel.txt", text))
    pieces = task.samples(prompts, length=500, count=100, seed=0)
    assert task.kind == "perplexity" and len(pieces) == 8
    assert text.startswith("".join(piece.input for piece in pieces))
    lengths = [len(prompts.text_ids(p.input)) for p in pieces]
    assert max(lengths) <= 500 and min(lengths[:-1]) > 400 and lengths[-1] >= 250


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.jsonl", _jsonl(RULER) + '{"input": ', "line 2: is no valid JSON"),
        ("a.jsonl", _jsonl(RULER) + "\n[1]\n", "line 3: holds .*wanted a JSON object"),
        ("a.jsonl", _jsonl(RULER, {**RULER, "outputs": []}), "line 2: outputs is"),
        ("a.jsonl", _jsonl(RULER, {**RULER, "outputs": ["a", " "]}), "line 2: outputs"),
        ("a.jsonl", _jsonl(RULER, {**RULER, "outputs": ""}), "line 2: outputs is ''"),
        ("a.jsonl", _jsonl({**RULER, "outputs": [math.nan]}), "line 1: outputs is"),
        ("a.jsonl", _jsonl({**RULER, "outputs": [math.inf]}), "line 1: outputs is"),
        ("a.jsonl", _jsonl({**RULER, "outputs": [True]}), "line 1: outputs is"),
        ("a.jsonl", _jsonl({**RULER, "outputs": [["a"]]}), "line 1: outputs is"),
        ("a.json", json.dumps([{**LONGBENCH, "answer": "AB"}]), "answer is 'AB'"),
        ("a.jsonl", _jsonl({**RULER, "input": 3}), "line 1: input is 3"),
        ("a.jsonl", _jsonl({**RULER, "answer_prefix": 3}), "line 1: answer_prefix"),
        ("a.jsonl", _jsonl({"text": "x"}), "line 1: has the fields .*RULER file"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", " \n", "is empty"),
        (
            "a.jsonl",
            _jsonl({"context": "x", "multi_turns": [{"input": "y"}]}),
            r"line 1: multi_turns\[0\]: answer is None",
        ),
        (
            "a.json",
            json.dumps([{**LONGBENCH, "answer": "E"}]),
            "entry 0: answer is 'E'",
        ),
        ("a.json", "{}", "wanted a JSON array"),
    ],
)
def test_malformed_files(tmp_path, name, text, named):
    with pytest.raises(CheckpointError, match=named) as refusal:
        read_task_file(_write(tmp_path, name, text))
    assert "\n" not in str(refusal.value)


def test_a_text_of_too_few_tokens(tmp_path, prompts):
    for text, length in (("abc", 500), ("a longer text", 3)):
        task = read_task_file(_write(tmp_path, "short.txt", text))
        with pytest.raises(ConfigError, match=r"short\.txt .*too few tokens"):
            task.samples(prompts, length=length, count=2, seed=0)
    # A rest of too few tokens is no piece.
    task = read_task_file(_write(tmp_path, "short.txt", "abcdefgh" * 2 + "ab"))
    pieces = task.samples(prompts, length=8, count=9, seed=0)
    assert min(len(prompts.text_ids(piece.input)) for piece in pieces) >= 5


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_task_file(str(tmp_path / "none.jsonl"))
