"""How a command ends: whatever the output is, and whenever Ctrl-C comes."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from sparda_jax.cli.ending import run_command

ROOT = pathlib.Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "sparda_jax.cli"]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError("x\ny"), 2, "p: x y\n"),
        (ConfigError("\udcff"), 2, "p: \\udcff\n"),
        (CheckpointError("y"), 2, "p: y\n"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), 2, "p: [Errno 5] Input/output"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (BrokenPipeError(), 141, ""),
        (None, 0, ""),
    ],
)
def test_every_end_is_one_line(capsys, error, status, told):
    def action():
        if error is not None:
            raise error

    assert run_command(action, prefix="p: ", interrupted="stopped") == status
    shown = capsys.readouterr().err
    assert shown.startswith(told)
    assert shown.count("\n") == (1 if told else 0)


def test_other_errors_are_faults_of_ours():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("arguments", [["models"], ["--help"]])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"sparda: ")
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_closed_pipe_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "models"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# Whoever is started in the background is started with Ctrl-C ignored.
_HEEDS_INTERRUPTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
_WAITING = """
import time
from sparda_jax.cli import main as cli
def wait():
    print("ready", flush=True)
    time.sleep(60)
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
        [sys.executable, "-c", _HEEDS_INTERRUPTS + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_an_interrupt_is_one_line():
    assert _interrupt(_WAITING, cwd=ROOT) == (130, b"sparda: interrupted\n")


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("sparda_jax.cli", b"sparda: interrupted\n"),
        ("train.main", b"interrupted\n"),
    ],
)
def test_an_interrupt_while_jax_is_imported_is_one_line(tmp_path, module, told):
    (tmp_path / "jax.py").write_text(
        "import time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
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
