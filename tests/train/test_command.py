"""How the trainer's commands end."""

import json
import sys

import pytest
from ending_cases import check_end, check_faults, check_outputs, ends

from train import ablate, main, prepare, report
from train.command import TrainingError, run_command


@pytest.mark.parametrize(
    ("error", "status", "told"),
    ends("sparda: ", "sparda: interrupted, and it was", TrainingError),
)
def test_every_end_is_one_line(capsys, error, status, told):
    check_end(run_command, capsys, error, status, told, interrupted=", and it was")


def test_other_errors_are_faults_of_ours():
    check_faults(run_command)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (ablate.main, ["--steps", "0"]),
        (ablate.main, ["--steps", str(2**40)]),
        (report.main, ["--rows", "0"]),
        (report.main, ["--batch", "-1"]),
        (report.main, ["--perplexity", "-1"]),
        (report.main, ["--heads", "ours.safetensors"]),
        (ablate.main, ["--out", "/no/such/file.json"]),
        (report.main, ["--out", "/no/such/file.json"]),
    ],
)
def test_wrong_numbers_are_one_line(tmp_path, capsys, command, flags):
    path = tmp_path / "config.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    assert command(["--config", str(path), *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"sparda: {flags[0]}=") and told.count("\n") == 1


@pytest.mark.parametrize("command", [ablate.main, main.main, prepare.main, report.main])
def test_missing_arguments_are_one_line(capsys, command):
    assert command([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sparda: the following arguments are required: ")
    assert told.endswith(" --help)\n") and told.count("\n") == 1


def test_preparing_what_is_not_there_is_one_line(tmp_path, capsys):
    for model in ("tiny", str(tmp_path / "none")):
        assert prepare.main(["x", "--model", model, "--out", str(tmp_path / "o")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.long  # of the same `run_command`: tests/sparda_jax/cli/test_ending.py
def test_a_full_or_closed_output_is_one_line(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    arguments = ["--print", "--config", str(path)]
    check_outputs([sys.executable, "-m", "train.main", *arguments], "sparda: ")
    assert main.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "distill"
