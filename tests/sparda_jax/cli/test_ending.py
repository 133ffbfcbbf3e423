"""How a command ends: whatever the output is, and whenever Ctrl-C comes."""

import gc
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import pytest
from ending_cases import ROOT, check_end, check_faults, check_outputs, ends

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import Parser

COMMAND = [sys.executable, "-m", "sparda_jax.cli"]


@pytest.mark.parametrize(
    ("error", "status", "told"), ends("p: ", "p: interrupted, as asked")
)
def test_every_end_is_one_line(capsys, error, status, told):
    how = {"prefix": "p: ", "interrupted": ", as asked"}
    check_end(run_command, capsys, error, status, told, **how)


def test_other_errors_are_faults_of_ours():
    check_faults(run_command)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckpointError("./h.json: no JSON"), "--heads=./h.json: no JSON"),
        (CheckpointError("h.json, line 2 is wrong"), "--heads=h.json, line 2 is wrong"),
        (CheckpointError("m/a.json: no JSON"), "--model=m: m/a.json: no JSON"),
        (CheckpointError("mm/a.json: no JSON"), "mm/a.json: no JSON"),
        (CheckpointError("x.json: no JSON"), "x.json: no JSON"),
        (FileNotFoundError(2, "No such file", "m"), "--model=m: No such file"),
    ],
)
def test_the_line_of_a_file_names_its_option(capsys, error, told):
    def action():
        parser = Parser()
        parser.add_argument("--heads")
        parser.add_argument("--model", type=pathlib.Path)
        parser.add_argument("--out", default="x.json")
        parser.parse_args(["--heads", "./h.json", "--model", "m/", "--out", "x.json"])
        raise error

    assert run_command(action) == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_closed_streams_are_empty_ones(monkeypatch):
    names, read = ("stdin", "stdout", "stderr"), []
    for name in names:
        monkeypatch.setattr(sys, name, None)

    def action():
        print("nobody sees it")
        read.append(sys.stdin.read())

    status = run_command(action)
    for name in names:
        getattr(sys, name).close()
    assert (status, read) == (0, [""])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_any_name_can_be_printed(monkeypatch, encoding):
    """Bytes of a path that are not UTF-8, letters that the output does not have."""
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding))
    assert run_command(lambda: print("caf\udce9 \u20ac")) == 0
    euro = "\u20ac" if encoding == "utf-8" else "\\u20ac"
    assert held.getvalue() == f"caf\\udce9 {euro}\n".encode(encoding)


@pytest.mark.parametrize(
    "arguments", [["models"], pytest.param(["--help"], marks=pytest.mark.slow)]
)
def test_a_full_or_closed_output_is_one_line(arguments):
    check_outputs([*COMMAND, *arguments], "sparda: ")


_WAITING = """
import time
from sparda_jax.cli import main as cli
def wait():
    print("ready", flush=True)
    time.sleep(600)
cli.sj.configure_offload = wait
raise SystemExit(cli.main(["models"]))
"""
_STARTING = """
import runpy
runpy.run_module({module!r}, run_name="__main__")
"""


def _interrupt(script: str, **settings) -> tuple[int, bytes]:
    """The status of a script that is interrupted where it says so, and its error."""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    return process.returncode, told


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("lost_in", ["collection", "destructor", "reference"])
def test_an_interrupt_is_never_lost(capsys, lost_in):
    """Errors of what garbage collection calls are printed, and nothing else."""
    before = signal.getsignal(signal.SIGINT)
    came, slept = [], []

    class Kept:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def callback(phase, info):
        if not came:
            came.append(phase)
            signal.raise_signal(signal.SIGINT)

    def action():
        if lost_in == "collection":
            gc.callbacks.append(callback)
            gc.collect()
        elif lost_in == "destructor":
            Kept()
        else:
            kept = set()  # unlike object(), may be referred to
            reference = weakref.ref(kept, lambda _: signal.raise_signal(signal.SIGINT))
            del kept
            assert reference() is None
        time.sleep(20)
        slept.append(True)

    try:
        assert run_command(action) == 130
    finally:
        gc.callbacks[:] = [call for call in gc.callbacks if call is not callback]
    assert not slept
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_is_one_line():
    assert _interrupt(_WAITING, cwd=ROOT) == (130, b"sparda: interrupted\n")


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("sparda_jax.cli", b"sparda: interrupted\n"),
        ("train.main", b"sparda: interrupted\n"),
    ],
)
def test_an_interrupt_while_jax_is_imported_is_one_line(tmp_path, module, told):
    (tmp_path / "jax.py").write_text(
        "import time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "except BaseException:\n"  # as an import that is optional
        "    pass\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    found = _interrupt(
        _STARTING.format(module=module), env={**os.environ, "PYTHONPATH": path}
    )
    assert found == (130, told)


def test_a_path_may_hold_bytes_that_are_not_utf8():
    command = [*COMMAND, "generate", "--no-compilation-cache", "--prompt", "x"]
    done = subprocess.run(
        [*command, b"--model", b"caf\xe9.gguf"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1, done.stderr
    assert b"no such file" in done.stderr
