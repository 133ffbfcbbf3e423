"""Files and directories that are either written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from sparda_jax.checkpoint.errors import CheckpointError


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a path to write to, and moves it to `path` when the block ends well.

    Raises:
      CheckpointError: The place cannot be written to, or is full.
    """
    target = pathlib.Path(path)
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name[:100]}.", dir=target.parent
        )
        os.close(handle)
    except OSError as error:
        raise _cannot_write(target, error) from error
    temporary = pathlib.Path(name)
    try:
        yield temporary
        # mkstemp makes a file for its owner alone; a model is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives an empty directory, and moves it to `path` when the block ends well.

    Raises:
      CheckpointError: `path` exists and is not an empty directory, or the place cannot
        be written to, or is full.
    """
    target = pathlib.Path(path)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(
                f"{target}: exists, allowed: a new or an empty directory"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        )
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.replace(temporary, target)  # Replaces an empty directory, too.
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_write(path: pathlib.Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}")
