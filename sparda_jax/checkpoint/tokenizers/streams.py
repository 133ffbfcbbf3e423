"""The text of one answer as its tokens come.

`tokenizers.decoders.DecodeStream` is not used: it has no end, so that bytes which are
no UTF-8 are held back for ever, and those before a valid character change its text.
"""

import codecs
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

_HELD = 8  # Tokens after which an unfinished character is given up.


@runtime_checkable
class TokenStream(Protocol):
    """Turns the tokens of one answer into text as they come."""

    def push(self, token_id: int) -> str:
        """Returns the text that is complete with this token, maybe none."""
        ...

    def flush(self) -> str:
        """Returns what is left; an unfinished character becomes U+FFFD."""
        ...


@functools.cache
def byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the
    characters from U+0100 on, in order.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    table = {chr(byte): byte for byte in plain}
    table.update((chr(256 + n), byte) for n, byte in enumerate(others))
    return table


class ByteStream:
    """Stream of a byte-level tokenizer: exact, one incremental UTF-8 decoder."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `TokenStream`."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """See `TokenStream`."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Stream of any other tokenizer: decodes the last tokens again, with the new one.

    The tokens before them give the context that a decoder may need (a leading space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # Tokens of _ids whose text is out.

    def push(self, token_id: int) -> str:
        """See `TokenStream`."""
        self._ids.append(token_id)
        held = len(self._ids) - self._shown
        if self._decode(self._ids).endswith("\ufffd") and held < _HELD:
            return ""
        return self.flush()

    def flush(self) -> str:
        """See `TokenStream`."""
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]
