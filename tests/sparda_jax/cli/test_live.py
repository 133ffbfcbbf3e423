"""The live line: on a terminal alone, and nothing of it left behind."""

import contextlib
import os

import pytest

from sparda_jax.cli.live import LiveLine


@pytest.fixture
def terminal():
    """(the side a program writes to, a function that closes it and reads it all)."""
    outer, inner = os.openpty()

    def written() -> str:
        # Bytes may come later than they were written, but not behind the end.
        stream.close()
        parts = []
        with contextlib.suppress(OSError):  # how Linux says that there is no more
            while part := os.read(outer, 10_000):
                parts.append(part)
        return b"".join(parts).decode()

    with os.fdopen(inner, "w") as stream:
        yield stream, written
    os.close(outer)


def test_nothing_goes_into_a_pipe(capsys):
    with LiveLine() as line:
        assert not line.due()
        line.show("5 tokens")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_of_its_own(terminal):
    stream, written = terminal
    with LiveLine(stream) as line:
        assert line.due()
        line.show("5 tokens")
        assert not line.due()
    assert written() == "\r\x1b[K5 tokens\r\x1b[K"


def test_below_a_text_on_the_same_terminal(terminal, monkeypatch):
    stream, written = terminal
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        patch.setenv("LINES", "24")
        patch.setenv("COLUMNS", "10")
        with pytest.raises(KeyboardInterrupt), LiveLine(stream) as line:
            line.show("5 tokens, 3 tokens/s")
            raise KeyboardInterrupt
    text = written()
    # A line feed would take the text's column as well.
    assert "\n" not in text and "\x1bD\x1b[1A" in text
    # The text scrolls in 23 rows, and has all 24 back at the end.
    assert "\x1b[1;23r" in text
    assert "\x1b[24;1H\x1b[2K\x1b[2m5 tokens,\x1b[0m" in text
    assert text.endswith("\x1b7\x1b[r\x1b[24;1H\x1b[2K\x1b8")
