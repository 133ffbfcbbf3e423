"""The directory of a run: it can be written to, and one trainer at a time has it."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Generator

from sparda_jax.config import ConfigError

LOCK = ".lock"


def _refused(path: str | os.PathLike, allowed: str) -> ConfigError:
    return ConfigError(f"out={str(path)!r} is not allowed: it must be {allowed}")


def check_writable(out: str | os.PathLike) -> pathlib.Path:
    """Makes the run's directory, before anything costs time.

    Raises:
      ConfigError: If it cannot be written to.
    """
    try:
        path = pathlib.Path(out).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    # RuntimeError: `~name` of a user that does not exist.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        allowed = f"a directory that can be written to ({reason})"
        raise _refused(out, allowed) from error
    return path


@contextlib.contextmanager
def hold_directory(path: pathlib.Path) -> Generator[None]:
    """Keeps other trainers out of a run's directory while the block runs.

    The system's own lock on a file, which ends with the process that has it: what a
    killed trainer leaves behind is no obstacle.

    Raises:
      ConfigError: Another process has the directory; names it.
    """
    try:
        file = open(path / LOCK, "a+")
    except OSError as error:
        reason = f"a directory that can be written to ({error.strerror})"
        raise _refused(path, reason) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                reason = f"on a file system with locks ({error.strerror})"
                raise _refused(path, reason) from error
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "that has not yet said which"
            raise _refused(
                path,
                f"a directory in which no other trainer runs, and process {holder} "
                "does: wait for its end, or choose another out=",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
