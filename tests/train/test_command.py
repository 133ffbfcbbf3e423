"""How the trainer's commands end."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from train import ablate, prepare, report
from train.command import TrainingError, run_command

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError("x"), 2, "error: x\n"),
        (CheckpointError("y"), 2, "error: y\n"),
        (TrainingError("z"), 2, "error: z\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on dev"),
        (KeyboardInterrupt(), 130, "interrupted, and it was\n"),
        (BrokenPipeError(), 141, ""),
        (None, 0, ""),
    ],
)
def test_every_end_is_one_line(capsys, error, status, told):
    def action():
        if error is not None:
            raise error

    assert run_command(action, interrupted=", and it was") == status
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") <= 1


def test_other_errors_are_faults_of_ours():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (ablate.main, ["--steps", "0"]),
        (ablate.main, ["--steps", str(2**40)]),
        (report.main, ["--rows", "0"]),
        (report.main, ["--batch", "-1"]),
        (report.main, ["--perplexity", "-1"]),
        (report.main, ["--heads", "ours.safetensors"]),
    ],
)
def test_wrong_numbers_are_one_line(tmp_path, capsys, command, flags):
    path = tmp_path / "config.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    assert command(["--config", str(path), *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {flags[0]}=") and told.count("\n") == 1


def test_preparing_what_is_not_there_is_one_line(tmp_path, capsys):
    for model in ("tiny", str(tmp_path / "none")):
        assert prepare.main(["x", "--model", model, "--out", str(tmp_path / "o")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_full_or_closed_output_is_one_line(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    command = [sys.executable, "-m", "train.main", "--print", "--config", str(path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141 and not done.stderr, done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout)["name"] == "distill"
