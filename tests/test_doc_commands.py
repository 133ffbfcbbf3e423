"""Commands of the documentation: known, taken, and run in sizes of a test."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import runpy
import subprocess
import sys
import warnings

import pytest
from doc_pages import NAMES, ROOT, all_options, commands, page_text
from text_model import text_lm, text_tokenizer
from tiny_directory import TINY, tiny_directory

import sparda_jax as sj
from benchmarks import bench
from sparda_jax.cli.main import build_parser, main
from train import adapt_command, options

__all__ = ["text_lm", "text_tokenizer"]

_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# Their options stand in parsers of their own.
_ABOVE = {
    "adapt": adapt_command.build_parser,
    "bench": bench.build_parser,
    "train": options.build_parser,
}


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_known(name):
    """Every `sparda` line has options that exist; modules, scripts, targets too."""
    targets = re.findall(r"^([a-z-]+):", page_text("Makefile"), re.M)
    known = all_options()
    for command, make in _ABOVE.items():
        known[command] = {o for a in make()._actions for o in a.option_strings}
    for words in commands(name):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"]:
            module = words[2].removesuffix(".<op>")
            assert importlib.util.find_spec(module) is not None, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[1] in known, words
            for word in words[2:] if words[1:3] != ["bench", "serve"] else []:
                if word.startswith("--"):
                    there = word.partition("=")[0] in known[words[1]]
                    assert there, f"{name}: {words}"


def test_whole_commands_are_taken():
    """Those of the first page, with all that an option needs."""
    taken = 0
    for name in ("README.md", "docs/index.md", "docs/offload.md", "docs/budget.md"):
        for words in commands(name):
            if words[0] == "sparda" and len(words) > 3 and "…" not in words:
                if not any(word.startswith(("<", ">", "|")) for word in words):
                    if words[1] in _ABOVE:
                        _ABOVE[words[1]]().parse_args(words[2:])
                    else:
                        build_parser().parse_args(words[1:])
                    taken += 1
    assert taken >= 7


def _modules() -> dict[tuple[str, ...], set[str]]:
    """Options that pages give to `python -m`, by module (and command of it)."""
    found: dict[tuple[str, ...], set[str]] = {}
    for name in NAMES:
        for words in commands(name):
            if words[:2] == ["python", "-m"] and "<" not in words[2]:
                own = words[3:4] if words[2] == "benchmarks.trace" else []
                given = {word for word in words[3:] if word.startswith("--")}
                found.setdefault((words[2], *own), set()).update(given)
    return found


def _help(words: tuple[str, ...], monkeypatch) -> str:
    """What a module says of its options."""
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        # Its package has imported it already.
        warnings.filterwarnings("ignore", message=".*found in sys.modules")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    return out.getvalue()


def test_modules_have_the_options_that_pages_give_them(monkeypatch):
    modules = _modules()
    assert ("benchmarks.offload",) in modules and len(modules) > 15
    for words, given in modules.items():
        told = _help(words, monkeypatch)
        for option in given:
            assert re.search(rf"{option}\b", told), (words, option)


# Sizes that a test has time for, put behind what a page's command says.
_SMALL = {
    "eval": ["--samples", "1", "--attention", "infllm_v2,sparda"],
    "forecast-report": ["--tokens", "640", "--rows", "1"],
    "generate": ["--max-new-tokens", "4"],
    # With its warm-up: tests/sparda_jax/evaluation/test_soak.py.
    "soak": ["--only", "1", "--context", "128", "--new", "24", "--minutes", "1"],
}
# One model stands in the place of theirs, but where commands only compute.
_MODEL = ("model", "forecast")
# What is tested by itself, fetches, or is no more than a name; the commands of the
# results took hours.
_NOT_HERE = ("adapt", "bench", "completion", "demo", "fetch", "serve", "train", "tune")
_SHOWN = ("README", "docs/index", "docs/budget", "docs/offload", "docs/evaluation")


def _shown_commands() -> list[list[str]]:
    found = []
    for name in _SHOWN:
        for words in commands(f"{name}.md"):
            if words[0] != "sparda":
                continue
            words = ["out" if word == "other" else word for word in words[1:]]
            bare = len(words) == 1 and words[0] not in ("models", "doctor")
            left_out = words[0] in _NOT_HERE or "--help" in words or bare
            # Of several processes: tests/sparda_jax/test_hosts.py.
            left_out = left_out or "--coordinator" in words
            if not left_out and words not in found:
                found.append(words)
    return found


def _small(words: list[str]) -> list[str]:
    extra = list(_SMALL.get(words[0], []))
    if "--no-compilation-cache" in all_options()[words[0]]:
        extra.append("--no-compilation-cache")
    return [*words, *extra]


def _run(words: list[str]) -> int:
    return main(_small(words))


def _asked(words: list[str]) -> str:
    """What a command asks for, whatever model it names: the same is run once."""
    given = vars(build_parser().parse_args(_small(words)))
    left_out = () if words[0] == "plan" else _MODEL
    return repr(sorted((k, v) for k, v in given.items() if k not in left_out))


@pytest.mark.slow
def test_commands_run(text_lm, monkeypatch, tmp_path, capsys):
    """Those of the pages that guide, on a tiny model in the place of theirs."""

    def load(model, *, attention="dense", **_):
        return sj.with_attention(text_lm, attention, forecast="from_query")

    monkeypatch.setattr(sj, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typed.txt").write_text("Who speaks?\n/exit\n")
    (tmp_path / "book.txt").write_text("stop an operation in the engine\n" * 60)
    ran = []
    for words in {_asked(words): words for words in _shown_commands()}.values():
        with open("typed.txt", encoding="utf-8") as typed:
            monkeypatch.setattr("sys.stdin", typed)
            status = _run(words)
        captured = capsys.readouterr()
        assert status == 0, (words, captured.err)
        assert captured.out
        ran.append(words[0])
    assert {"generate", "chat", "models", "plan", "soak", "eval", "report"} <= set(ran)


@pytest.mark.slow
def test_commands_for_your_own_model_run(text_tokenizer, monkeypatch, tmp_path, capsys):
    """Those of the pages about other models, on a directory of safetensors."""
    monkeypatch.chdir(tmp_path)
    tiny_directory(tmp_path / "my-model", text_tokenizer, TINY)
    (tmp_path / "documents").mkdir()
    for index in range(24):
        text = f"{index} stop an operation in the engine, {index * 7919} times. " * 24
        (tmp_path / "documents" / f"{index}.txt").write_text(text)
    small = "--steps 2 --seq-len 512 --kernel-size 16 --init-batches 2 --passkeys 0"
    ran = []
    for name in ("docs/adapt.md", "docs/export.md"):
        for words in commands(name):
            if words[0] != "sparda" or words[1:] in ran:
                continue
            if words[1] == "adapt":
                end = [*small.split(), "--least-mass", "0.3", "--text", "documents"]
                end += [] if "--whole" in words else ["--rank", "8"]
                # Two steps leave the heads unfit for it, which status 1 says.
                with pytest.raises(SystemExit, match="1"):
                    adapt_command.main([*words[2:], *end])
            else:
                assert _run(words[1:]) == 0, (words, capsys.readouterr().err)
            ran.append(words[1:])
    made = ("my-heads.safetensors", "my-heads.md", "my-heads.json", "my-heads.png")
    made += ("heads.pt", "q_future.safetensors", "my-model-sparda/config.json")
    assert all((tmp_path / name).is_file() for name in made)
    names = [words[0] for words in ran]
    assert names.count("adapt") == names.count("generate") == 2
    assert {"models", "export", "export-forecast"} <= set(names)


_TINY = "--model tiny --layers 2"
# Measuring commands of the pages, in small: how, not how fast.
_MEASURED = {
    "benchmarks.best": (
        f"{_TINY} --context 1024 --most 1 --ways resident sparda --steps 8"
    ),
    "benchmarks.host_routes": "--gib 0.01 --blocks 8 --repeats 1",
    "benchmarks.host_writes": "--blocks 8 --repeats 1",
    "benchmarks.layer_storage": "--model smollm2-135m --layers 2 --batch 1 --calls 2",
    "benchmarks.look_ahead": "benchmarks/traces/{own}.npz",
    "benchmarks.mesh": f"{_TINY} --context 2048 --steps 8 --devices 1 --mode resident",
    "benchmarks.offload": (
        f"{_TINY} --context 1024 --batch 2 --steps 8 --limit 4 --mode sparse sparda"
    ),
    "benchmarks.prefill": f"{_TINY} --context 640 --repeats 1 --attention sparda",
    "benchmarks.prefill_attention": (
        f"{_TINY} --context 512 --tokens 64 --layers 1 --repeats 1"
    ),
    "benchmarks.scale": "--model tiny --context 4096 --cards 1 2 --host-cards 2",
    "benchmarks.trace show": "benchmarks/traces/{own}.npz",
    "pallas_kernels.benchmarks.block_scores": "--small --tokens 512",
    "pallas_kernels.benchmarks.block_sparse_attention": "--small --tokens 512",
    "pallas_kernels.benchmarks.choose_blocks": "--small",
    "pallas_kernels.benchmarks.host_gather": "--small",
    "pallas_kernels.benchmarks.paged_decode_attention": "--small",
    "pallas_kernels.benchmarks.plan_slots": "--small",
    "train.benchmark": f"{_TINY} --seq-len 512 --repeats 1",
}
# The first three take minutes with real weights; `calls`, `moe_decode`, `prefer_held`,
# `trace record` and all behind `all`, which runs the others on a card, have tests of
# their own.
_MEASURED_ELSEWHERE = {
    "benchmarks.cpu",
    "benchmarks.codec_error",
    "benchmarks.layers_ahead",
    "benchmarks.calls",
    "benchmarks.moe_decode",
    "benchmarks.prefer_held",
    "benchmarks.trace record",
    "benchmarks.all",
    # Reads a GPU's profile.
    "pallas_kernels.benchmarks.decode_account",
    "pallas_kernels.tuning",
    "train.ablate",
    "train.main",
}


def test_no_command_run_here_leaves_a_file_compiled_with_checks(monkeypatch):
    """Commands of everybody else would read it, and end in a traceback."""
    source = ROOT / "train" / "benchmark.py"
    kept = pathlib.Path(importlib.util.cache_from_source(str(source)))
    before = kept.read_bytes() if kept.exists() else None
    assert "usage" in _help(("train.benchmark",), monkeypatch)
    assert (kept.read_bytes() if kept.exists() else None) == before


def test_every_measuring_command_is_run_or_said_why_not():
    shown = {" ".join(words) for words in _modules()}
    assert shown == _MEASURED.keys() | _MEASURED_ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("words", _MEASURED)
def test_measuring_commands_run(words):
    small = _MEASURED[words].format(own="smollm2-135m_4k_code_infllm_v2")
    done = subprocess.run(
        [sys.executable, "-m", *words.split(), *small.split()],
        cwd=ROOT,
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d", done.stdout)
