"""Files and directories that are either written whole or not at all.

What has been moved to its name is on the disk: the file, and then the directory that
names it, are synchronised, so that a machine that loses power leaves the old content or
the new one and never an empty file.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sparda_jax.checkpoint.errors import CheckpointError

# What file systems answer that cannot synchronise a directory.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


def _beside(target: pathlib.Path) -> pathlib.Path:
    """A hidden name that nobody else has, in the same directory.

    Made by an ordinary open or mkdir, so that the user's umask applies; `tempfile`
    would make files for the owner alone.
    """
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if folder:  # It may be written to and not read: nothing can be done.
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Generator[pathlib.Path]:
    """Gives a path to write to, and moves it to `path` when the block ends well.

    A symbolic link stays, and what it names is replaced.

    Raises:
      CheckpointError: The place cannot be written to, is full, or is a directory, a
        device or the like.
    """
    try:
        target = pathlib.Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise CheckpointError(
                f"{path}: is a directory, a device or a pipe, allowed: a new file, or "
                "one to replace"
            )
        temporary = _beside(target)
        temporary.touch(exist_ok=False)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Generator[pathlib.Path]:
    """Gives an empty directory, and moves it to `path` when the block ends well.

    Raises:
      CheckpointError: `path` exists and is not an empty directory, or the place cannot
        be written to, or is full.
    """
    target = pathlib.Path(path).absolute()
    temporary = _beside(target)
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
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        os.replace(temporary, target)  # Replaces an empty directory, too.
        _sync(target.parent)
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
