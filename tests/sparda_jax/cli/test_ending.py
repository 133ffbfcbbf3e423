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


_WAITING = """
import time
from sparda_jax.cli import main as cli
def wait(argv):
    print("ready", flush=True)
    time.sleep(60)
cli.sj.configure_offload = lambda: wait(None)
raise SystemExit(cli.main(["models"]))
"""


def test_an_interrupt_is_one_line():
    with subprocess.Popen(
        [sys.executable, "-c", _WAITING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, b"sparda: interrupted\n")


def test_a_path_may_hold_bytes_that_are_not_utf8():
    command = [*COMMAND, "generate", "--no-compilation-cache", "--prompt", "x"]
    done = subprocess.run(
        [*command, b"--model", b"caf\xe9.gguf"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1, done.stderr
    assert b"no such file" in done.stderr
