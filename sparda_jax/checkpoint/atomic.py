"""Files and directories of this package: written whole or not at all, by
`pallas_kernels.atomic_file`, and every failure one line."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pallas_kernels import atomic_file
from sparda_jax.checkpoint.errors import CheckpointError


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Generator[pathlib.Path]:
    """`pallas_kernels.atomic_file.new_file`, with one line for what goes wrong.

    Raises:
      CheckpointError: The place cannot be written to, is full, or is a directory, a
        device or the like.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(
            f"{path}: is a directory, a device or a pipe, allowed: a new file, or one "
            "to replace"
        )
    file = contextlib.ExitStack()
    try:
        temporary = file.enter_context(atomic_file.new_file(path))
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
    try:
        with file:
            yield temporary
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Generator[pathlib.Path]:
    """Gives an empty directory, and moves it to `path` when the block ends well.

    Raises:
      CheckpointError: `path` exists and is not an empty directory, or the place cannot
        be written to, or is full.
    """
    target = pathlib.Path(path).absolute()
    temporary = atomic_file.beside(target)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(
                f"{target}: exists, allowed: a new or an empty directory"
            )
        temporary.mkdir(parents=True)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise cannot_write(target, error) from error
    try:
        yield temporary
        atomic_file.move(temporary, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
      CheckpointError: As `new_file`.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes JSON, indented, whole or not at all.

    Raises:
      CheckpointError: As `new_file`.
    """
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes one safetensors file; equal content gives equal bytes.

    Raises:
      OSError: The disk is full, or the like.
    """
    try:
        safetensors.numpy.save_file(dict(tensors), path, dict(metadata))
    except safetensors.SafetensorError as error:
        # The library wraps what the system said.
        raise OSError(" ".join(str(error).split())) from error
    _order_header(path)


def _order_header(path: pathlib.Path) -> None:
    """Sorts the metadata of a file: the library writes them in random order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Only the order differs; blanks at the end are the format's padding.
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def cannot_write(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """The one line for a place that is full, or that may not be written to."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CheckpointError(f"{path}: cannot be written: {reason}")
