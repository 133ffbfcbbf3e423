"""How commands end: what an action raises, and outputs that cannot be written."""

import errno
import os
import pathlib
import subprocess
from collections.abc import Sequence

import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError

ROOT = pathlib.Path(__file__).parents[1]


def ends(prefix: str, interrupted: str, *refusals: type[Exception]) -> list[tuple]:
    """(error, exit status, what is told) of all that an action may raise."""
    full, broken = (
        (OSError(code, os.strerror(code)), 2, f"{prefix}[Errno {code}] {told}\n")
        for code, told in (
            (errno.ENOSPC, "No space left on device"),
            (errno.EIO, "Input/output error"),
        )
    )
    return [
        (None, 0, ""),
        *(
            (error("x\ny"), 2, f"{prefix}x y\n")
            for error in (ConfigError, CheckpointError, *refusals)
        ),
        (ConfigError("\udcff"), 2, f"{prefix}\\udcff\n"),
        full,
        broken,
        (KeyboardInterrupt(), 130, f"{interrupted}\n"),
        (BrokenPipeError(), 141, ""),
    ]


def check_end(run, capsys, error, status: int, told: str, **settings) -> None:
    """`run` is a `run_command`; nothing is told but one line."""

    def action():
        if error is not None:
            raise error

    assert run(action, **settings) == status
    assert capsys.readouterr().err == told


def check_faults(run) -> None:
    """Other errors are faults of ours, and seen as such."""
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def _run(command: Sequence[str], output) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


def check_outputs(command: Sequence[str], prefix: str) -> None:
    """A full disk is one line, and a closed pipe is no fault."""
    with open("/dev/full", "w") as full:
        status, told = _run(command, full)
    assert status == 2 and told.startswith(prefix) and told.count("\n") == 1, told
    assert "No space left on device" in told
    reader, writer = os.pipe()
    os.close(reader)
    assert _run(command, writer) == (141, "")
    os.close(writer)
