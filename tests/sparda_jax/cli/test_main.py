"""The `sparda` command: help that teaches, one line for bad input, real output."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.cli import generate as cli_generate
from sparda_jax.cli.main import main

OFF = "--no-compilation-cache"


def _run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def _refused(capsys, *arguments):
    """Runs what must fail; returns its one line."""
    status, out, err = _run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("sparda: ")]
    assert status == 2
    assert out == ""
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("command", [[], ["generate"], ["demo"], ["models"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if command in ([], ["generate"]):
        assert "examples:" in text
        assert "--block-budget 16" in text


def test_models_lists_presets_and_attentions(capsys):
    status, out, _ = _run(capsys, "models")
    assert status == 0
    assert "8,185,253,888" in out
    for name in ("smollm2-135m", "nosa-8b", "dense", "infllm_v2", "nosa", "sparda"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "tiny", "--attention", "magic"], "--attention='magic'"),
        (["--model", "no/such/file.gguf"], "no/such/file.gguf"),
        (["--model", "minicpm4.1-8b"], "not in the package index"),
        (["--model", "tiny", "--attention", "sparda"], "forecast='from_query'"),
        (["--model", "tiny", "--attention", "nosa"], "key bias"),
        (["--model", "tiny", "--block-budget", "2"], "forced blocks"),
        (["--model", "tiny", "--local-blocks", "-1"], "--local-blocks=-1"),
        (["--model", "tiny"], "no tokenizer"),
        (["--model", "tiny", "--forecast", "nothing.safetensors"], "not a file"),
    ],
)
def test_bad_model_options(capsys, arguments, named):
    line = _refused(capsys, "generate", "--prompt", "hello", OFF, *arguments)
    assert named in line


@pytest.fixture(scope="module")
def loaded() -> list:
    """The real model, once a request of this module has loaded it."""
    return []


@pytest.mark.network
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt-file", "{missing}"], "No such file"),
        (["--prompt-file", "{binary}"], "not UTF-8: byte 3 is 0xff"),
        (["--prompt", "word " * 9000], "at most 8192 fit the context"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature=-1"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature=nan"),
        (["--prompt", "x", "--top-p", "2"], "--top-p=2"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--prompt", "x", "--stop-id", "99999"], "stop_ids holds 99999"),
        (["--prompt", "x", "--stop", ""], "text of at least one character"),
        (["--prompt", "x", "--answer-prefix", "So"], "needs --question or --chat"),
        (["--prompt", "x", "--chat-arg", "a=1"], "--chat-arg needs --question or"),
    ],
)
def test_bad_request(
    capsys, tmp_path, smollm2_path, arguments, named, loaded, monkeypatch
):
    load = cli_generate.load_model

    def load_once(*given):
        if not loaded:
            loaded.append(load(*given))
        return loaded[0]

    monkeypatch.setattr(cli_generate, "load_model", load_once)
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    places = {"missing": tmp_path / "missing", "binary": tmp_path / "binary"}
    arguments = [argument.format(**places) for argument in arguments]
    line = _refused(capsys, "generate", OFF, "--model", str(smollm2_path), *arguments)
    assert named in line


@pytest.mark.network
@pytest.mark.parametrize("kind", ["truncated", "noise"])
def test_damaged_gguf(capsys, tmp_path, smollm2_path, kind):
    path = tmp_path / "model.gguf"
    with open(smollm2_path, "rb") as file:
        head = file.read(5_000_000)
    if kind == "noise":
        rng = np.random.default_rng(0)
        head = head[:64] + rng.integers(0, 256, 4096, np.uint8).tobytes()
    path.write_bytes(head)
    line = _refused(capsys, "generate", OFF, "--model", str(path), "--prompt", "hello")
    assert "model.gguf" in line


def test_read_only_cache_directory(tmp_path):
    """A cache that cannot be made: one line, status 2, nothing left behind."""
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    environment = {**os.environ, "SPARDA_CACHE": str(blocker / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "sparda_jax", "generate", "--prompt", "hi"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert any(line.startswith("sparda: ") for line in done.stderr.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
@pytest.mark.long  # of a tiny model: `test_commands_run`
@pytest.mark.network
def test_generate_answers_and_reports(capsys, smollm2_path):
    status, out, err = _run(
        capsys,
        "generate",
        OFF,
        "--model",
        str(smollm2_path),
        "--prompt",
        "The capital of France is",
        "--max-new-tokens",
        "8",
        "--stop",
        "is the",
        "--stop",
        ".",
        "--stats",
    )
    assert status == 0
    assert out == " Paris\n"
    assert "tokens/s" in err
    assert "attention dense" in err


@pytest.mark.slow
@pytest.mark.long  # of 700 tokens: the notebook `long_document`
@pytest.mark.network
def test_offload_answers_as_resident_does(capsys, tmp_path, smollm2_path):
    """SmolLM2 over 4,000 tokens: the same text, with what it fetched in figures."""
    from sparda_jax.evaluation.texts import python_manual

    document = tmp_path / "manual.txt"
    document.write_text(python_manual()[:15_500], encoding="utf-8")
    command = ("generate", "--prompt-file", str(document), "--attention", "sparda")
    command += ("--question", "What does assert do?", "--max-new-tokens", "24")
    texts = {}
    # Room for every block would fetch none.
    few = ("--device-blocks", str(sj.load("smollm2-135m").sparse.block_budget))
    for cache, room in (("resident", ()), ("offload", few)):
        status, out, err = _run(
            capsys, *command, "--cache", cache, *room, "--stats", OFF
        )
        assert status == 0
        texts[cache] = out
    assert texts["offload"] == texts["resident"] != ""
    figures = re.search(r"(\d+) hits, (\d+) misses .* (\d+\.\d) MB fetched", err)
    assert figures is not None, err
    hits, misses, megabytes = map(float, figures.groups())
    assert 0 < misses < hits
    # 64 tokens of K and V, 64 wide, in float32.
    assert megabytes == pytest.approx(misses * 64 * 2 * 64 * 4 / 1e6, abs=0.1)
