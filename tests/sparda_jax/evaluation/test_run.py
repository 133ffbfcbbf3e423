"""Runs: the same files whether killed or not, guards, reports, bad input."""

import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from evaluation_cases import character_tokenizer

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.cli.main import main
from sparda_jax.config import ConfigError
from sparda_jax.evaluation import answers
from sparda_jax.evaluation.report import compare, read_report, write_report
from sparda_jax.evaluation.token_scores import Views

TASKS = ("passkey", "latent_needle")
WANTED = {"lengths": [1500], "budgets": [4, 6], "samples": 3, "batch": 2}


@pytest.fixture(scope="module")
def lm():
    """The model with random weights, and a tokenizer."""
    return dataclasses.replace(sj.load("tiny"), tokenizer=character_tokenizer())


class FakeGenerate:
    """Answers without a model: dense finds what it is asked for, others half of it.

    It reads the token ids that come, as a model would: what is asked must be in them.
    """

    def __init__(self, tokenizer, *, fail_after=None, dense_finds=True):
        self._tokenizer = tokenizer
        self.calls = 0
        self._fail_after = fail_after
        self._dense_finds = dense_finds
        self.prompts = []

    def __call__(self, lm, prompts, *, max_new_tokens, **_):
        if self._fail_after is not None and self.calls >= self._fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        rows = [self._answer(lm, ids) for ids in prompts]
        self.prompts.append((lm.selector.name, prompts))
        return types.SimpleNamespace(
            tokens=rows,
            finish_reasons=["stop"] * len(rows),
            stats=types.SimpleNamespace(decode_blocks=(lm.sparse.block_budget, 24)),
        )

    def _answer(self, lm, ids):
        text = self._tokenizer.decode(ids)
        known = text.split("passkey number of this document is ")
        answer = known[1][:5] if len(known) > 1 else "nobody"
        right = self._dense_finds if lm.selector.dense else sum(ids) % 2 == 0
        return self._tokenizer.encode(f" {answer}." if right else " none.")


def test_devices_that_share_rows_are_refused(lm, tmp_path, monkeypatch):
    # A machine of two devices.
    monkeypatch.setattr("sparda_jax.engine.model.check_mesh", lambda *_: None)
    rows = dataclasses.replace(lm, mesh=sj.MeshConfig(data=2))
    with pytest.raises(ConfigError, match=r"lm.mesh='data=2,model=1' .* data=1"):
        sj.evaluate(rows, out=tmp_path)


def _run(lm, monkeypatch, out, **settings):
    fake = FakeGenerate(lm.tokenizer, **settings.pop("fake", {}))
    monkeypatch.setattr(answers, "generate", fake)
    chosen = {"attention": ["infllm_v2", "random"], "tasks": TASKS, "floor": 30}
    outcome = sj.evaluate(lm, out=out, **WANTED | chosen | settings)
    return outcome, fake


def _files(folder):
    """Contents of all files; dates and times of the run aside."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_file() and path.name != "seconds.jsonl":
            content = path.read_bytes()
            if path.name == "run.json":
                content = {**json.loads(content), "started": ""}
            found[str(path.relative_to(folder))] = content
    return found


def test_killed_and_resumed_is_the_same_as_whole(lm, monkeypatch, tmp_path):
    whole, _ = _run(lm, monkeypatch, tmp_path / "whole")
    assert whole.complete and (whole.done, whole.skipped) == (6, 4)
    kills = 0
    while True:
        try:
            again, _ = _run(
                lm, monkeypatch, tmp_path / "killed", fake={"fail_after": 3}
            )
            break
        except KeyboardInterrupt:
            kills += 1
            assert kills < 20
    assert kills >= 3 and again.complete
    assert _files(tmp_path / "whole") == _files(tmp_path / "killed")
    # All is there: nothing is run again.
    _, third = _run(lm, monkeypatch, tmp_path / "killed")
    assert third.calls == 0
    # Each cell that was done says what it took, once.
    lines = (tmp_path / "killed" / "seconds.jsonl").read_text().splitlines()
    took = [json.loads(line) for line in lines]
    cells = {(row["task"], row["attention"], row["budget"]) for row in took}
    assert len(took) == len(cells) == again.done
    assert all(row["seconds"] >= row["compiling"] >= 0 for row in took)


def test_results_on_other_samples_are_refused_before_anything_runs(
    lm, monkeypatch, tmp_path
):
    """As of another Python's manual, in a directory that has results alone."""
    _run(lm, monkeypatch, tmp_path, tasks=["passkey"])
    shutil.rmtree(tmp_path / "samples")
    _, same = _run(lm, monkeypatch, tmp_path, tasks=["passkey"])
    assert same.calls == 0
    shutil.rmtree(tmp_path / "samples")
    (result,) = (tmp_path / "results").glob("passkey-1500-random-4.jsonl")
    lines = result.read_text().splitlines()
    other = json.dumps({**json.loads(lines[1]), "prompt": "0123456789abcdef"})
    result.write_text("\n".join([lines[0], other, lines[2]]) + "\n")
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "python": "3.11.99"}))
    before = _files(tmp_path)
    told = r"'passkey' at 1500 tokens on other samples \(passkey-1500-random-4\.jsonl: "
    told += r"sample 1\): it was begun by Python 3\.11\.99, this is 3\."
    with pytest.raises(ConfigError, match=told):
        _run(lm, monkeypatch, tmp_path, tasks=["passkey"], budgets=[7])
    assert _files(tmp_path) == before


def test_every_selector_gets_the_same_tokens(lm, monkeypatch, tmp_path):
    _, fake = _run(lm, monkeypatch, tmp_path, tasks=["passkey"])
    by_name = {}
    for name, prompts in fake.prompts:
        by_name.setdefault(name, []).append(prompts)
    first = by_name["dense"]
    assert by_name["random"] == first * 2 and by_name["infllm_v2"] == first * 2
    # The last batch is filled up: it needs no program of its own.
    assert [len(batch) for batch in first] == [2, 2]


def test_floor_gate_counts_and_reports(lm, monkeypatch, tmp_path):
    _run(lm, monkeypatch, tmp_path)
    report = read_report(tmp_path)
    text = report.markdown()
    table = report.tables[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["dense"][0].startswith("100.0 [")
    assert rows["dense"][1] == "not measured"
    assert "latent_needle: 0.0" in table.note
    assert any(name.startswith("infllm_v2, 4 blocks") for name in rows)
    assert f"- tokenizer: tiny, {lm.tokenizer.vocab_size} tokens" in text
    counts = next(t for t in report.tables if t.title == "Samples")
    assert counts.rows[0][2] == "3" and counts.rows[0][-1] == "yes"
    names = write_report(report)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for outside in ("http://", "https://", "<script", "@import", "url("):
        assert outside not in page
    assert {"report.md", "report.html", "summary.json"} <= set(names)
    assert page.count("data:image/png;base64,") == 2 * sum(
        name.endswith(".png") for name in names
    )


def test_a_selector_without_a_budget_is_not_taken_for_dense(lm, monkeypatch, tmp_path):
    # Dense finds passkeys, this one does not: the floor is dense's.
    attention = ["magicpig_tokens", "random"]
    _run(lm, monkeypatch, tmp_path, attention=attention, floor=100, tasks=["passkey"])

    def wrong(self, lm, ids):
        return self._tokenizer.encode(" none.")

    monkeypatch.setattr(FakeGenerate, "_answer", wrong)
    (tmp_path / "results" / "passkey-1500-magicpig_tokens.jsonl").unlink()
    (tmp_path / "results" / "passkey-1500-random-4.jsonl").unlink()
    again, _ = _run(
        lm, monkeypatch, tmp_path, attention=attention, floor=100, tasks=["passkey"]
    )
    assert again.complete and not again.skipped
    rows = {row[0]: row[1:] for row in read_report(tmp_path).tables[0].rows}
    assert rows["dense"][-1] == "" and rows["MagicPIG"][-1].startswith("-100.0 [")


def test_failures_stay_in_the_mean(lm, monkeypatch, tmp_path):
    import jax

    _run(lm, monkeypatch, tmp_path, tasks=["passkey"])
    fake = FakeGenerate(lm.tokenizer)

    def broken(lm, prompts, **options):
        if len(prompts) > 1:
            raise ConfigError("a request does not fit")
        if sum(prompts[0]) % 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory")
        return fake(lm, prompts, **options)

    monkeypatch.setattr(answers, "generate", broken)
    sj.evaluate(
        lm, out=tmp_path, attention=["window"], tasks=["passkey"], floor=30, **WANTED
    )
    report = read_report(tmp_path)
    table = next(t for t in report.tables if t.title == "Failures")
    assert table.rows and all("RESOURCE_EXHAUSTED" in row[2] for row in table.rows)
    cell = next(r for c, r in report.cells.items() if c.attention == "window")
    assert len(cell) == 3
    assert all(record["score"] == 0 for record in cell if "failed" in record)


def test_a_batch_that_does_not_fit_is_halved(lm, monkeypatch, tmp_path):
    fake, sizes = FakeGenerate(lm.tokenizer), []

    def small(lm, prompts, **options):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise ConfigError("a request does not fit")
        return fake(lm, prompts, **options)

    monkeypatch.setattr(answers, "generate", small)
    wanted = WANTED | {"samples": 5, "batch": 5}
    sj.evaluate(lm, out=tmp_path, attention=["dense"], tasks=["passkey"], **wanted)
    # The smaller half has the size of the other: it needs no program of its own.
    assert sizes == [5, 3, 3]
    (records,) = read_report(tmp_path).cells.values()
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    assert not any("failed" in record for record in records)


def test_compare(lm, monkeypatch, tmp_path):
    _run(lm, monkeypatch, tmp_path / "a", tasks=["passkey"])
    _run(lm, monkeypatch, tmp_path / "b", tasks=["passkey"], seed=7)
    same = compare(tmp_path / "a", tmp_path / "a")
    assert {row[-1] for row in same.rows} == {"+0.00 [+0.00, +0.00]"}
    other = compare(tmp_path / "a", tmp_path / "b")
    assert {row[-1] for row in other.rows} == {"prompts differ"}
    _run(lm, monkeypatch, tmp_path / "c", tasks=["latent_needle"])
    with pytest.raises(ConfigError, match="in common"):
        compare(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": ["nih"]}, r"tasks='nih' .*niah_single_1"),
        ({"tasks": []}, "is empty"),
        ({"attention": ["magic"]}, r"attention='magic' .*infllm_v2"),
        ({"attention": ["sparda"]}, "from_query"),
        ({"lengths": [5000]}, "lengths=5000 .*4096, the context"),
        ({"lengths": [60]}, r"lengths=60 .*needs \d+ tokens"),
        ({"lengths": []}, "at least one length"),
        ({"budgets": ["a%"]}, r"budgets\[0\]='a%'"),
        ({"budgets": [1]}, "forced blocks"),
        ({"samples": 0}, "samples=0"),
        ({"floor": 101}, "floor=101"),
    ],
)
def test_bad_arguments(lm, tmp_path, settings, named):
    chosen = {"tasks": TASKS, **WANTED, **settings}
    with pytest.raises(ConfigError, match=named):
        sj.evaluate(lm, out=tmp_path / "out", **chosen)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_and_unwritable_places(lm, monkeypatch, tmp_path):
    _run(lm, monkeypatch, tmp_path / "a", tasks=["passkey"])
    with pytest.raises(ConfigError, match="begun with seed=42, and this run has 7"):
        _run(lm, monkeypatch, tmp_path / "a", tasks=["passkey"], seed=7)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _run(lm, monkeypatch, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"no run\.json"):
        read_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "nih", "--out", "x"], "tasks='nih'"),
        (["--attention", "magic", "--out", "x"], "attention='magic'"),
        (["--model", "tiny"], "--out is missing"),
        (["--model", "tiny", "--out", "x"], "sparda: model 'tiny' has no tokenizer"),
        (
            ["--lengths=nan", "--out", "x"],
            "--lengths=nan is not allowed: it must be an",
        ),
        (["--lengths=1024.5", "--out", "x"], "=1024.5 is not allowed: it must be an"),
        (["--compare", "", "x"], "--compare=''"),
        (["--lengths", "many", "--out", "x"], "--lengths='many'"),
        (["--task-file", "none.jsonl", "--out", "x"], "No such file"),
        (["--compare", "none", "none"], "no run.json"),
    ],
)
def test_command_line(capsys, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    status = main(["eval", "--no-compilation-cache", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert [named in line for line in lines if line.startswith("sparda: ")] == [True]
    assert list(tmp_path.iterdir()) == []


def test_report_names_its_argument(capsys):
    assert main(["report", ""]) == 2
    assert "DIR='' is not allowed" in capsys.readouterr().err


def test_files_of_others_are_known_by_their_content(lm, monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"input": "passkey number of this document is 12345", "outputs": ["12345"]}
    file.write_text(json.dumps(row))
    wanted = {"tasks": (), "task_files": [file], "attention": ["dense"]}
    first, _ = _run(lm, monkeypatch, tmp_path / "out", **wanted)
    again, fake = _run(lm, monkeypatch, tmp_path / "out", **wanted)
    assert first.complete and again.complete and fake.calls == 0
    other = tmp_path / "other" / "mine.jsonl"
    other.parent.mkdir()
    other.write_text(json.dumps({**row, "outputs": ["1"]}))
    for files, named in (
        ([other], "another content of the task file 'mine'"),
        ([file, other], "another file is task 'mine'"),
    ):
        with pytest.raises(ConfigError, match=named):
            _run(lm, monkeypatch, tmp_path / "out", **wanted | {"task_files": files})


def test_the_commit_can_be_told(lm, monkeypatch, tmp_path, capsys):
    for commit in ("abc", "def"):
        chosen = {"tasks": ["passkey"], "attention": ["dense"], "commit": commit}
        _run(lm, monkeypatch, tmp_path, progress=True, **chosen)
    assert read_report(tmp_path).settings["commits"] == ["abc", "def"]
    assert "passkey 1500 dense: 100.0, 3 samples, " in capsys.readouterr().err


def test_dense_answers_that_are_gone_are_made_again(lm, monkeypatch, tmp_path):
    asked = []

    def answer(lm, prompts, **_):
        asked.append(lm.selector.name)
        if sum(prompts[0]) == fails:
            raise ConfigError("does not fit")
        return types.SimpleNamespace(tokens=[[5, 6, 7]])

    def view(lm, prompt, answer, about):
        shape = (len(answer) - 1, 4)
        tokens = np.zeros(shape, np.int32) if about is None else about
        logs = np.full(shape, -3.0 - len(lm.selector.name), np.float32)
        return Views(np.array(answer[1:]), tokens, logs)

    monkeypatch.setattr(answers, "generate", answer)
    monkeypatch.setattr(answers, "view_of_answer", view)
    fails = -1

    def run(name):
        chosen = {"attention": [name], "tasks": ["agreement"], "floor": 0}
        sj.evaluate(lm, out=tmp_path, **WANTED | chosen | {"budgets": [4]})
        cells = read_report(tmp_path).cells.items()
        return next(records for cell, records in cells if cell.attention == name)

    whole = run("window")
    assert asked == ["dense"] * 3 and all(record["kl"] > 0 for record in whole)
    (file,) = (tmp_path / "reference").iterdir()
    kept = file.read_bytes()
    file.unlink()
    # "random" is as long a name as "window", so its fake views are the same.
    assert [r["kl"] for r in run("random")] == [r["kl"] for r in whole]
    assert asked == ["dense"] * 6 and file.read_bytes() == kept
    # A prompt that dense cannot answer fails with the others, and says so.
    file.unlink()
    with np.load(tmp_path / "samples/agreement-1500.npz") as arrays:
        fails = int(arrays["tokens"][: arrays["counts"][0]].sum())
    records = run("infllm_v2")
    assert [r.get("failed") is not None for r in records] == [True, False, False]
    assert "no answer to compare with" in records[0]["failed"]


@pytest.mark.slow
@pytest.mark.long  # `test_commands_run`
def test_a_real_model_runs_every_kind_of_task(lm, tmp_path):
    tasks = ["niah_single_1", "retr_kv", "perplexity_code", "agreement"]
    # 24 blocks with the answers; stacked layers are quicker to compile.
    wanted = {"tasks": tasks, "lengths": [1400], "samples": 2, "floor": 0}
    stacked = dataclasses.replace(
        sj.load("tiny", storage="stacked"), tokenizer=lm.tokenizer
    )
    whole = sj.evaluate(
        stacked, out=tmp_path, attention=["infllm_v2"], budgets=[4, 24], **wanted
    )
    assert whole.complete
    report = read_report(tmp_path)
    cells = {(c.task, c.budget): records for c, records in report.cells.items()}
    for task in tasks:
        # With a budget of all blocks every selector is dense.
        full, dense = cells[task, 24], cells[task, 0]
        for one, other in zip(full, dense, strict=True):
            for field in ("output", "tokens", "likeliest", "score"):
                assert one.get(field) == other.get(field)
    assert cells["agreement", 0][0]["score"] == 100
    assert cells["agreement", 0][0]["kl"] < 1e-6
    assert cells["agreement", 4][0]["kl"] > 1e-4
    quarters = cells["perplexity_code", 0][0]["by_position"]
    assert len(quarters) == 4
