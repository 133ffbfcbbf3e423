"""Files and directories that are either written whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Generator, Mapping

import numpy as np
import safetensors
import safetensors.numpy

from sparda_jax.checkpoint.errors import CheckpointError


def _beside(target: pathlib.Path) -> pathlib.Path:
    """A hidden name that nobody else has, in the same directory.

    Made by an ordinary open or mkdir, so that the user's umask applies; `tempfile`
    would make files for the owner alone.
    """
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Generator[pathlib.Path]:
    """Gives a path to write to, and moves it to `path` when the block ends well.

    Raises:
      CheckpointError: The place cannot be written to, or is full.
    """
    target = pathlib.Path(path)
    temporary = _beside(target)
    try:
        temporary.touch(exist_ok=False)
    except (OSError, ValueError) as error:
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
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
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        os.replace(temporary, target)  # Replaces an empty directory, too.
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes one safetensors file.

    Raises:
      OSError: The disk is full, or the like.
    """
    try:
        safetensors.numpy.save_file(dict(tensors), path, dict(metadata))
    except safetensors.SafetensorError as error:
        # The library wraps what the system said.
        raise OSError(" ".join(str(error).split())) from error


def _cannot_write(path: pathlib.Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path}: cannot be written: {reason}")
