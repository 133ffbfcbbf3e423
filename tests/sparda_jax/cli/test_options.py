"""Every option of the command line has a row of values that it refuses.

Each is refused in one line, before anything is loaded. A new option fails here until it
has a row.
"""

import argparse
import functools
import importlib
import os
import re

import pytest

import sparda_jax as sj
from sparda_jax.cli import model_options
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.main import build_parser, main
from sparda_jax.cli.options import Parser

HUGE = "9" * 5000
LONE = os.fsdecode(b"\xff\xfe")  # bytes of an argument that are not UTF-8
INTEGER = ("many", "", "nan", "inf", "1.5", "True", "-1", HUGE, LONE, "0x10", "1e99")
NUMBER = ("much", "", "nan", "inf", "-inf", "-1", HUGE, LONE, "1j", "0,5")
TEXT = (LONE, f"text {LONE} text")
WORD = ("no such word", "", LONE, HUGE, "RESIDENT")
PATH = ("", "a\0b")
FLAG = ()

_MODEL = {
    "--model": PATH,
    "--forecast": PATH,
    "--forecast-base": WORD,
    "--block-budget": (*INTEGER, "0"),
    "--local-blocks": (*INTEGER, "0"),
    "--init-blocks": INTEGER,
    "--compressed-keys": WORD,
    "--dtype": WORD,
    "--mesh": (*WORD, "model=0", "2", "model=2,model=2", "data=99999", "data=1\u0662"),
    "--weights": WORD,
    "--no-compilation-cache": FLAG,
}
# Commands that run on one device.
_ALONE = {name: bad for name, bad in _MODEL.items() if name != "--mesh"}
_SLOTS = {
    "--attention": WORD,
    "--device-blocks": (*INTEGER, "0"),
    "--prefetch": WORD,
    "--layer0": WORD,
    "--route": WORD,
    "--host-codec": WORD,
}
_SIZE = (*NUMBER, "0")
_ANSWER = {
    **_MODEL,
    **_SLOTS,
    "--cache": WORD,
    "--layers-ahead": (*INTEGER, "0", "9"),
    "--exactness": WORD,
    "--recall-every": INTEGER,
    "--chat-arg": (*TEXT, "", "x", "=1", "a b=1", "messages=1"),
    "--max-new-tokens": (*INTEGER, "0"),
    "--temperature": NUMBER,
    "--top-k": INTEGER,
    "--top-p": (*NUMBER, "0", "1.5"),
    "--min-p": (*NUMBER, "1.5"),
    "--repetition-penalty": (*NUMBER, "0"),
    "--seed": (*INTEGER, str(2**32)),
    "--stop": (*TEXT, ""),
    "--stop-id": INTEGER,
    "--ignore-eos": FLAG,
    "--json": FLAG,
}
ROWS = {
    "generate": {
        **_ANSWER,
        "--prompt": TEXT,
        "--prompt-file": PATH,
        "--coordinator": TEXT,
        "--num-processes": (*INTEGER, "0"),
        "--process-id": INTEGER,
        "--question": TEXT,
        "--chat": FLAG,
        "--answer-prefix": TEXT,
        "--stats": FLAG,
    },
    "chat": {**_ANSWER, "--system": TEXT, "--document": PATH},
    "plan": {
        **_SLOTS,
        **{name: _MODEL[name] for name in _MODEL if name.endswith("-blocks")},
        "--model": PATH,
        "--block-budget": (*INTEGER, "0"),
        "--compressed-keys": WORD,
        "--dtype": WORD,
        "--context": (*INTEGER, "0"),
        "--hbm": _SIZE,
        "--host": _SIZE,
        "--batch": (*INTEGER, "0"),
        "--max-new-tokens": (*INTEGER, "0"),
        "--prefill-chunk": INTEGER,
        "--miss": (*NUMBER, "1.5"),
        "--trace": PATH,
        "--measure": FLAG,
        "--mesh": (*WORD, "model=0"),
        "--device-kind": (LONE,),
        "--link": _SIZE,
        "--bandwidth": _SIZE,
        "--peak": _SIZE,
    },
    "models": {"--model": PATH},
    "fetch": {"--model": WORD},
    "doctor": {"--json": FLAG, "--measure": FLAG},
    "tune": {"--small": FLAG},
    "report": {},
    "eval": {
        **_MODEL,
        "--compare": FLAG,
        "--attention": ("", LONE),
        "--tasks": ("", LONE),
        "--task-file": PATH,
        "--lengths": (*INTEGER, "0"),
        "--budget": ("", LONE, "0", "-8", "some", "8,0", "101%", "nan%"),
        "--samples": (*INTEGER, "0"),
        "--seed": (*INTEGER, str(2**32)),
        "--storage": WORD,
        "--batch": (*INTEGER, "0"),
        "--floor": (*NUMBER, "101"),
        "--time-limit": _SIZE,
        "--commit": ("", LONE),
        "--out": PATH,
    },
    "forecast-report": {
        **_ALONE,
        "--text": PATH,
        "--tokens": (*INTEGER, "0"),
        "--rows": (*INTEGER, "0"),
        "--held-out": (*NUMBER, "0.6"),
        "--split-seed": INTEGER,
        **dict.fromkeys(
            (
                "--min-recall",
                "--min-recall-at-budget",
                "--min-layer-recall",
                "--min-mass",
                "--max-lost",
            ),
            (*NUMBER, "1.5"),
        ),
        "--layer-budgets": PATH,
        "--out": PATH,
    },
    "export-forecast": {
        "--model": PATH,
        "--forecast": PATH,
        "--format": WORD,
        "--out": PATH,
    },
    "export": {
        "--model": PATH,
        "--forecast": PATH,
        "--format": WORD,
        "--dtype": WORD,
        "--out": PATH,
    },
    "train": {},
    "adapt": {},  # tests/train/test_adapt.py
    "serve": {
        **_MODEL,
        **_SLOTS,
        "--cache": WORD,
        "--layers-ahead": (*INTEGER, "0", "9"),
        "--exactness": WORD,
        "--recall-every": INTEGER,
        "--host": (*TEXT[:1], ""),
        "--port": (*INTEGER, "65536"),
        "--model-name": (LONE, ""),
        "--max-batch": (*INTEGER, "0"),
        "--max-context": (*INTEGER, "1"),
        "--max-new-tokens": (*INTEGER, "0"),
        "--prefill-chunk": (*INTEGER, "0"),
        "--decode-steps": (*INTEGER, "0"),
        "--max-waiting": INTEGER,
        "--top-logprobs": INTEGER,
        "--prefix-bytes": INTEGER,
        "--request-timeout": (*NUMBER, "0"),
        "--client-timeout": (*NUMBER, "0"),
        "--max-body-bytes": (*INTEGER, "1023"),
        "--max-connections": (*INTEGER, "0"),
        "--api-key": (LONE, ""),
        "--on-term": WORD,
    },
    "bench": {},  # tests/benchmarks/test_bench.py
    "soak": {
        **_ALONE,
        **{name: row for name, row in _SLOTS.items() if name != "--host-codec"},
        "--prefetch": (*WORD, "auto"),
        "--minutes": _SIZE,
        "--requests": (*INTEGER, "0"),
        "--tokens": (*INTEGER, "0"),
        "--new": (*INTEGER, "3"),
        "--context": (*INTEGER, "63"),
        "--check-every": (*INTEGER, "0"),
        "--seed": (*INTEGER, str(2**32)),
        "--only": INTEGER,
        "--storage": WORD,
        "--json": FLAG,
    },
    "completion": {},
    "demo": {
        **_MODEL,
        "--tokens": (*INTEGER, "0"),
        "--depth": (*NUMBER, "1.5"),
        "--seed": (*INTEGER, str(2**32)),
    },
}
BESIDE = {
    "generate": {"--model": "tiny", "--prompt": "x"},
    "plan": {"--model": "tiny", "--context": "999", "--hbm": "1", "--host": "1"},
    "demo": {"--model": "tiny"},
    "chat": {"--model": "tiny"},
    "soak": {"--model": "tiny"},
    "serve": {"--model": "tiny"},
    "models": {},
    "export": {"--model": "tiny", "--out": "x"},
    "export-forecast": {"--model": "tiny", "--out": "x.pt"},
    "fetch": {},
    "eval": {"--model": "tiny", "--out": "x"},
    "forecast-report": {"--model": "tiny", "--text": "pydoc", "--out": "x"},
}


@pytest.fixture(autouse=True, scope="module")
def _one_parser():
    """Built once: nothing of a call stays in it."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("sparda_jax.cli.main")
        patch.setattr(module, "build_parser", functools.cache(build_parser))
        yield


def _commands() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    raise AssertionError("the parser has no commands")


def test_every_option_has_a_row():
    commands = _commands()
    assert set(commands) == set(ROWS)
    for name, parser in commands.items():
        options = {o for action in parser._actions for o in action.option_strings}
        assert options - {"-h", "--help"} == set(ROWS[name]), name


CASES = [(name, option) for name, row in ROWS.items() for option in row if row[option]]


@pytest.mark.parametrize(("command", "option"), CASES)
def test_bad_values_are_one_line(capsys, monkeypatch, command, option):
    def never(*arguments, **named):
        raise AssertionError("a bad value must be refused before anything is loaded")

    monkeypatch.setattr(model_options, "load_model", never)
    monkeypatch.setattr(sj, "load", never)
    monkeypatch.setattr(sj, "configure_offload", never)
    for bad in ROWS[command][option]:
        given = dict(BESIDE[command])
        if option == "--prompt-file":
            del given["--prompt"]
        beside = [x for pair in given.items() if pair[0] != option for x in pair]
        # Joined: a value that begins with a dash is no option.
        status = main([command, *beside, f"{option}={bad}"])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), bad
        assert err.startswith(f"sparda: {option}="), err
        assert err.count("\n") == 1
        assert len(err) < 400


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: COMMAND"),
        (["magic"], "invalid choice: 'magic'"),
        (["generate"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["generate", "--prompt"], "expected one argument"),
        (["plan"], "required: --model, --context, --hbm, --host"),
        (["plan", "--model", "tiny"], "required: --context, --hbm, --host"),
        (["completion"], "required: shell"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["models", f"--{LONE}\n"], "unrecognized arguments"),
        (["models", "x" * 10_000], "unrecognized arguments"),
    ],
)
def test_what_argparse_refuses_is_one_line(capsys, arguments, told):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.startswith("sparda: ")
    assert err.count("\n") == 1
    assert len(err) < 1100


def test_help_shows_defaults_that_say_something(capsys):
    for command in ("generate", "chat", "plan", "demo"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "(default: None)" not in text
        assert "(default: False)" not in text
        assert re.search(r"\(default: \S+\)", text)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparda {sj.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sj.__version__)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("enable_thinking=false", ("enable_thinking", False)),
        ('tools=[{"name": "f"}]', ("tools", [{"name": "f"}])),
        ("date=26 July", ("date", "26 July")),
        ("x=", ("x", "")),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_variables_of_the_chat_template(written, value):
    parsed = build_parser().parse_args(
        ["generate", "--model", "tiny", "--prompt", "x", "--chat-arg", written]
    )
    assert parsed.chat_arg == [value]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("model='x' is unknown: give model=2", "--model='x' is unknown: give model=2"),
        ("CacheConfig.device_blocks=3 is few", "--slots=3 is few"),
        ("host='a', port=1 is taken", "--host='a', --port=1 is taken"),
        ("num_kv_heads=2 cannot be divided", "num_kv_heads=2 cannot be divided"),
        ("data.seq_len=3 is short", "data.seq_len=3 is short"),
        ("no field here", "no field here"),
    ],
)
def test_what_the_library_says_names_options(capsys, told, shown):
    """Of this command, as they are typed; what is no option of it stays as it is."""

    def action():
        parser = Parser()
        for name in ("--model", "--host", "--port", "--data"):
            parser.add_argument(name)
        parser.add_argument("-s", "--slots", dest="device_blocks")
        parser.parse_args([])
        raise sj.ConfigError(told)

    assert run_command(action) == 2
    assert capsys.readouterr().err == f"{shown}\n"
    # The next command's options are its own.
    assert run_command(lambda: sj.SparseConfig(block_size=-1)) == 2
    assert capsys.readouterr().err.startswith("SparseConfig.block_size=-1")
