"""What the rows of a batch have given: tokens, texts, events, reasons."""

import collections
from collections.abc import Iterator, Sequence

import numpy as np

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.engine.results import StreamEvent, TokenLogprobs
from sparda_jax.engine.row_request import RowOutput, RowRequest
from sparda_jax.inference.generate import GenerateState
from sparda_jax.inference.logprobs import TokenLogs


def token_logprobs(
    logs: TokenLogs, tokens: Sequence[int], first: int = 0
) -> list[TokenLogprobs]:
    """Logs of tokens as plain numbers.

    Args:
      logs: Arrays [T] and [T, top] on the host.
      tokens: The tokens.
      first: Where in the arrays the first of them is.
    """
    at = slice(first, first + len(tokens))
    own, top, logs_of_top = (np.asarray(x)[at].tolist() for x in logs)
    return [
        TokenLogprobs(
            token,
            own[i],
            tuple(p for p in zip(top[i], logs_of_top[i], strict=True) if p[0] >= 0),
        )
        for i, token in enumerate(tokens)
    ]


class RowOutputs:
    """Reads the tokens of a state as they come.

    Attributes:
      asked: What the request of each row asks for.
    """

    def __init__(self, tokenizer: Tokenizer | None, rows: int):
        self._tokenizer = tokenizer
        self.asked = [RowRequest()] * rows
        self._texts = [asked.text(tokenizer) for asked in self.asked]
        self._num_read = [0] * rows
        self._events: collections.deque[StreamEvent] = collections.deque()

    def ask(self, row: int, request: RowRequest) -> None:
        """Says what a row's request asks for; it has given nothing yet."""
        self.asked[row] = request
        self._texts[row] = request.text(self._tokenizer)
        self._num_read[row] = 0
        self._events = collections.deque(e for e in self._events if e.index != row)

    @property
    def has_stop_strings(self) -> bool:
        """Whether a row ends at a text."""
        return any(asked.stop for asked in self.asked)

    def read(self, state: GenerateState) -> np.ndarray | None:
        """Takes in the new tokens.

        Decoding pauses after every token that may complete a stop string, so a row
        whose string is complete has no token behind it.

        Returns:
          Which rows have ended, if a stop string has just ended one; else None.
        """
        done = np.array(state.done)
        matched = False
        counts, room = np.asarray(state.generated), np.asarray(state.tokens)
        for index, count in enumerate(counts.tolist()):
            text, read = self._texts[index], self._num_read[index]
            if count > read:
                self._push(state, index, room[index, read:count].tolist())
            matched |= text.matched and not done[index]
            done[index] |= text.matched
            rest = text.flush() if done[index] and count else ""
            if rest:
                self._events.append(StreamEvent(index, -1, rest))
        return done if matched else None

    def _push(self, state: GenerateState, row: int, tokens: list[int]) -> None:
        """Takes in new tokens of a row."""
        text, read = self._texts[row], self._num_read[row]
        logs: Sequence[TokenLogprobs | None] = [None] * len(tokens)
        if self.asked[row].logprobs and state.logs is not None:
            of_row = TokenLogs(*(np.asarray(x)[row] for x in state.logs))
            logs = token_logprobs(of_row, tokens, read)
        for token, log in zip(tokens, logs, strict=True):
            self._events.append(StreamEvent(row, token, text.push(token), log))
        self._num_read[row] = read + len(tokens)

    def take_events(self) -> Iterator[StreamEvent]:
        """The events that were read and not taken yet."""
        while self._events:
            yield self._events.popleft()

    def outputs(self, state: GenerateState) -> list[RowOutput]:
        """What every row has given so far."""
        done, broken = np.asarray(state.done), np.asarray(state.broken)
        tokenizer, found = self._tokenizer, []
        for row, tokens in enumerate(row_tokens(state)):
            asked, text = self.asked[row], self._texts[row]
            if text.matched:
                shown = text.text
            else:
                shown = "" if tokenizer is None else tokenizer.decode(tokens)
            if broken[row]:
                reason = "non_finite"
            elif tokens and (tokens[-1] in asked.stop_ids or text.matched):
                reason = "stop"
            else:
                reason = "length" if done[row] else "cancelled"
            found.append(RowOutput(tokens, shown, reason))
        return found


def row_tokens(state: GenerateState) -> list[list[int]]:
    """Output tokens of every row so far."""
    tokens, counts = np.asarray(state.tokens), np.asarray(state.generated)
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
