"""Tokens as they come."""

from collections.abc import Callable, Iterator

from sparda_jax.engine.results import GenerateOutput, StreamEvent
from sparda_jax.engine.session import Session


class Stream:
    """Tokens as they come: iterate over it; `output` holds the result afterwards."""

    def __init__(
        self,
        session: Session,
        tokens_per_call: int,
        on_progress: Callable[[int], None] | None,
    ):
        self._session = session
        self._tokens_per_call = tokens_per_call
        self._on_progress = on_progress
        self.output: GenerateOutput | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt: what the progress callback counts up to."""
        return max(len(row) for row in self._session.rows)

    def __iter__(self) -> Iterator[StreamEvent]:
        session = self._session
        tokenizer = session.lm.tokenizer
        decoders = [
            None if tokenizer is None else tokenizer.stream()
            for _ in range(session.batch)
        ]
        told = [0] * session.batch
        session.prefill(on_progress=self._on_progress)
        while True:
            for index, row in enumerate(session.tokens()):
                for token in row[told[index] :]:
                    decoder = decoders[index]
                    text = "" if decoder is None else decoder.push(token)
                    yield StreamEvent(index, token, text)
                told[index] = len(row)
            if session.finished:
                break
            session.decode(self._tokens_per_call)
        for index, decoder in enumerate(decoders):
            rest = "" if decoder is None else decoder.flush()
            if rest:
                yield StreamEvent(index, -1, rest)
        self.output = session.output(split=True)
