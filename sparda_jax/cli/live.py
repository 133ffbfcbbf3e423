"""A line of figures that is drawn again while text is printed.

It is drawn on a terminal only, and never into a file or a pipe. Where the text goes to
the same terminal, the last row is kept for the line: the text scrolls above it (the
escape sequences of VT100, which every terminal of today has).
"""

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_SECONDS_BETWEEN = 0.2


class LiveLine:
    """The line, for the time of a `with` block."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()
        self._below = self._shown and sys.stdout.isatty()
        self._last = -_SECONDS_BETWEEN
        self._rows = 0

    @property
    def shown(self) -> bool:
        """Whether anybody sees it."""
        return self._shown

    def due(self) -> bool:
        """Whether it is time to draw it again: figures cost a look at the device."""
        return self._shown and time.monotonic() - self._last >= _SECONDS_BETWEEN

    def show(self, text: str) -> None:
        """Draws it."""
        if not self._shown:
            return
        self._last = time.monotonic()
        columns, rows = shutil.get_terminal_size()
        text = text[: max(1, columns - 1)]
        if not self._below:
            self._write(f"\r\x1b[K{text}")
            return
        if rows != self._rows:
            self._rows = rows
            # One row below the text (in the same column), then scrolling only above it.
            self._write(f"\x1bD\x1b[1A\x1b7\x1b[1;{max(1, rows - 1)}r\x1b8")
        self._write(f"\x1b7\x1b[{rows};1H\x1b[2K\x1b[2m{text}\x1b[0m\x1b8")

    def close(self) -> None:
        """Takes it away, and gives the last row back."""
        if not self._shown:
            return
        if self._below and self._rows:
            self._write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")
        elif not self._below:
            self._write("\r\x1b[K")
        self._shown = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> "LiveLine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
