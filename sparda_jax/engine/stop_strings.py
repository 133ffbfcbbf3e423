"""Texts that end an output, right across the boundaries of tokens."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import ConfigError
from sparda_jax.engine.model import LanguageModel


def check_stop(lm: LanguageModel, stops: tuple[str, ...]) -> None:
    """Raises ConfigError if there are stop strings, and no tokenizer to find them."""
    if stops and lm.tokenizer is None:
        raise ConfigError(
            f"stop={stops!r} is not allowed: model {lm.config.name!r} has no tokenizer "
            "to find texts with; use stop_ids"
        )


def special_ids(tokenizer: Tokenizer | None, stops: Sequence[str]) -> set[int]:
    """Ids of the stop strings that name a special token, which has no text to match."""
    if tokenizer is None:
        return set()
    named = [tokenizer.token_id(stop) for stop in stops]
    ids = {token_id for token_id in named if token_id is not None}
    return {token_id for token_id in ids if not tokenizer.decode([token_id])}


def pause_tokens(lm: LanguageModel, stops: Sequence[str]) -> Bool[Array, " V"]:
    """Tokens after which decoding must pause and see whether a stop string is complete.

    The token that completes one brings its last byte along. Of a tokenizer whose
    tokens have no bytes of their own, every token may.
    """
    pause = np.zeros(lm.config.vocab_size, bool)
    if stops:
        assert lm.tokenizer is not None
        found = None
        if not any("\ufffd" in stop for stop in stops):  # what broken bytes become
            found = lm.tokenizer.tokens_with({stop.encode()[-1] for stop in stops})
        if found is None:
            pause[:] = True
        else:
            pause[[token for token in found if token < len(pause)]] = True
    return jax.device_put(pause)


class StopMatcher:
    """Passes a text on, piece by piece, up to the first stop string.

    What may be the beginning of one is held back. Of several the one that is complete
    first ends the text, of those the longest; so it does not matter how the text is
    cut into pieces.

    Attributes:
      matched: Whether a stop string was found; nothing is passed on any more.

    Args:
      stops: The stop strings.
      include: Pass the one that was found on as well.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops = stops
        self._include = include
        self._held = ""
        self._longest = max((len(stop) for stop in stops), default=0)
        self.matched = False

    def push(self, piece: str) -> str:
        """Takes a further piece; returns the text that is safe to show now."""
        if self.matched:
            return ""
        whole = self._held + piece
        found = [(whole.find(stop), stop) for stop in self._stops]
        ends = [(at + len(stop), at) for at, stop in found if at >= 0]
        if ends:
            self.matched, self._held = True, ""
            end, at = min(ends)
            return whole[: end if self._include else at]
        cut = len(whole) - self._beginning(whole)
        self._held = whole[cut:]
        return whole[:cut]

    def flush(self) -> str:
        """What is held back when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, whole: str) -> int:
        """Length of the longest end of a text that begins a stop string."""
        for length in range(min(self._longest - 1, len(whole)), 0, -1):
            if any(stop.startswith(whole[-length:]) for stop in self._stops):
                return length
        return 0


class RowText:
    """The text of one output, from its tokens as they come.

    Attributes:
      text: What has been passed on so far.

    Args:
      tokenizer: The model's.
      stops: Texts that end the output.
      first: How many tokens pass before stop strings are looked for.
      include_stop: Whether the text ends behind its stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        *,
        first: int = 0,
        include_stop: bool = False,
    ):
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._matcher = StopMatcher(stops, include=include_stop)
        self._unsearched = first
        self.text = ""

    @property
    def matched(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._matcher.matched

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that it completes."""
        piece = "" if self._decoder is None else self._decoder.push(token)
        if self._unsearched > 0:
            self._unsearched -= 1
            self.text += piece
            return piece
        return self._pass_on(piece)

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        rest = "" if self._decoder is None else self._decoder.flush()
        shown = self._pass_on(rest)
        rest = self._matcher.flush()
        self.text += rest
        return shown + rest

    def _pass_on(self, piece: str) -> str:
        shown = self._matcher.push(piece)
        self.text += shown
        return shown
