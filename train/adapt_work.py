"""The folder of the work of `adapt`: what an earlier call has kept there."""

import contextlib
import pathlib
from collections.abc import Generator
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import one_line, require
from train.metrics import read_log

_MAX_FILE = 1 << 22


def read_kept(path: pathlib.Path) -> dict[str, Any] | None:
    """What a file of the folder says; None if it is not there yet.

    Raises:
      CheckpointError: It cannot be read, or is no JSON object.
    """
    return read_json(path, _MAX_FILE)


def same_call(path: pathlib.Path, identity: dict[str, Any]) -> None:
    """Refuses another call than the one that the folder was begun with.

    Raises:
      ConfigError: Names the first option that differs.
    """
    held = read_kept(path)
    if held is None:
        return
    held = {"reads": "input"} | held  # calls from before there was a choice
    for field, value in identity.items():
        before = held.get(field)
        require(
            before == value,
            field,
            value,
            f"{before!r}, with which {path.parent.name} was begun; or another out=",
        )


@contextlib.contextmanager
def kept(path: pathlib.Path) -> Generator[None]:
    """Reads what an earlier call has kept; a damaged file is one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise CheckpointError(
            f"{path}: is damaged ({told}): take another out=, or delete {path.parent}"
        ) from error


def first_evaluation(log: pathlib.Path) -> dict[str, Any] | None:
    """Held-out figures after the regression."""
    for line in read_log(log):
        if line["kind"] == "eval" and line["step"] == 0:
            skipped = ("layers", "kind", "step", "seconds")
            return {k: v for k, v in line.items() if k not in skipped}
    return None
