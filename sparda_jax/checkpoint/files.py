"""The one reader of files that others made: regular files only, of a bounded size.

A path may name a pipe (opening it waits for a writer), a device (reading it never
ends) or a file that is larger than memory. Every file that is read whole comes through
here; tensors are mapped by those who know their headers, after `open_regular`.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from typing import Any, BinaryIO

from sparda_jax.checkpoint.errors import CheckpointError, show

MAX_JSON = 1 << 25  # The index of a large model has a few MB.
MAX_TEXT = 1 << 28  # The longest prompts: 2^28 bytes are more than 50M tokens.

_MISSING = (errno.ENOENT, errno.ENOTDIR)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _failed(path: os.PathLike | str, error: OSError | ValueError) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    text = os.fspath(path)
    # A name out of a damaged file may have thousands of characters.
    shown = text if len(text) <= 500 and text.isprintable() else show(text)
    return CheckpointError(f"{shown}: cannot be read: {reason}")


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a regular file of this name.

    Raises:
      CheckpointError: The name is one that no file can have, or may not be looked at.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise _failed(path, error) from error
    except ValueError as error:
        raise _failed(path, error) from error


def open_regular(
    path: str | os.PathLike, *, limit: int | None = None, pipes: bool = False
) -> BinaryIO:
    """Opens a regular file for reading; never waits, whatever the path names.

    Args:
      path: The file.
      limit: Most bytes that it may have, None for any number.
      pipes: A pipe will do as well; one that nobody writes to is empty.

    Returns:
      The open file.

    Raises:
      FileNotFoundError: There is no such file.
      CheckpointError: It cannot be opened, is no regular file, or is too large.
    """
    try:
        # A pipe or a terminal must not block the opening, nor become ours.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in _MISSING:
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
        raise _failed(path, error) from error
    except ValueError as error:  # A zero byte in the name.
        raise _failed(path, error) from error
    try:
        status = os.fstat(descriptor)
        if pipes and stat.S_ISFIFO(status.st_mode):
            os.set_blocking(descriptor, True)  # Opened: now its writer is waited for.
        elif not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is no regular file")
        if limit is not None and status.st_size > limit:
            raise CheckpointError(
                f"{path}: {status.st_size} bytes, allowed: at most {limit}"
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: str | os.PathLike, limit: int, *, pipes: bool = False
) -> bytes | None:
    """Reads a regular file whole.

    Args:
      path: The file.
      limit: Most bytes that it may have.
      pipes: As for `open_regular`.

    Returns:
      Its contents, None if there is no such file.

    Raises:
      CheckpointError: It cannot be read, is no regular file, or is too large.
    """
    try:
        file = open_regular(path, limit=limit, pipes=pipes)
    except FileNotFoundError:
        return None
    with file:
        try:
            # A file can grow while it is read, and those of /proc have size 0.
            content = file.read(limit + 1)
        except OSError as error:
            raise _failed(path, error) from error
    if len(content) > limit:
        raise CheckpointError(f"{path}: over {limit} bytes, allowed: at most {limit}")
    return content


def read_text(
    path: str | os.PathLike, limit: int = MAX_TEXT, *, pipes: bool = False
) -> str | None:
    """Reads a regular file of UTF-8 text; arguments, result, errors of `read_bytes`."""
    content = read_bytes(path, limit, pipes=pipes)
    return None if content is None else _as_text(content, path)


def read_stream(file: BinaryIO, where: str, limit: int = MAX_TEXT) -> str:
    """Reads a stream of UTF-8 text, such as standard input, to its end.

    Raises:
      CheckpointError: It is no UTF-8, or has more than `limit` bytes.
    """
    content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{where}: over {limit} bytes, allowed: at most {limit}")
    return _as_text(content, where)


def _as_text(content: bytes, where: str | os.PathLike) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8: byte {error.start} is {content[error.start]:#04x}"
        ) from error


def parse_json(
    text: str,
    where: str,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Parses JSON whose strings are all valid Unicode.

    Args:
      text: The JSON.
      where: File and field that it comes from, for messages.
      pairs_hook: Makes a value of an object's keys and values; a ValueError refuses it.

    Returns:
      The value.

    Raises:
      CheckpointError: It is no JSON, too deeply nested, or holds a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
        # Half a character can only come from such an escape; it could not be written.
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{where}: holds half a character (a lone surrogate), "
            f"{show(error.object[error.start : error.end])}: is no valid JSON text"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no valid JSON: {error}") from error
    return value


def read_json(path: str | os.PathLike, limit: int = MAX_JSON) -> dict[str, Any] | None:
    """Reads a JSON object.

    Args:
      path: The file.
      limit: Most bytes that it may have.

    Returns:
      The object, None if there is no such file.

    Raises:
      CheckpointError: The file cannot be read, is too large, or is no JSON object.
    """
    content = read_bytes(path, limit)
    if content is None:
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no valid JSON: {error}") from error
    value = parse_json(text, os.fspath(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {show(value)}, wanted a JSON object")
    return value
