"""Files that are written whole or not at all.

What has been moved to its name is on the disk: the file, and then the directory that
names it, are synchronised, so that a machine that loses power leaves the old content or
the new one and never an empty file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Generator
from pathlib import Path

# What file systems answer that cannot synchronise a directory.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


def beside(target: Path) -> Path:
    """A hidden name that nobody else has, in the same directory.

    For an ordinary open or mkdir, so that the user's umask applies; ``tempfile`` would
    make files for the owner alone.
    """
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")


def synchronise(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk.

    Raises:
      OSError: The disk is full, or the like.
    """
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


def move(source: Path, target: Path) -> None:
    """Gives a file or directory its name once what it holds is on the disk.

    Raises:
      OSError: The disk is full, or the like; the old content is still there.
    """
    if source.is_dir():
        for inside in source.rglob("*"):
            synchronise(inside)
    synchronise(source)
    os.replace(source, target)  # Replaces an empty directory, too.
    synchronise(target.parent)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Generator[Path]:
    """Gives a path to write to, and moves it to ``path`` when the block ends well.

    A symbolic link stays, and what it names is replaced.

    Raises:
      OSError: The place cannot be written to, or is full.
    """
    target = Path(os.path.realpath(path))
    temporary = beside(target)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
