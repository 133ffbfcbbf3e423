"""Tokens as they come."""

import threading
from collections.abc import Callable, Generator

from sparda_jax.checks import ConfigError
from sparda_jax.engine.call import Call
from sparda_jax.engine.results import GenerateOutput, GenerateStats, StreamEvent


class Stream:
    """Tokens as they come: an iterator, consumed once.

    A loop that is left goes on where it stopped when the stream is iterated again; once
    all events are out there are no more. Several threads may take events from one
    stream: each event goes to one of them. After an error a stream does not go on.

        stream = sj.stream(lm, ["Once upon a time"], max_new_tokens=64)
        for event in stream:
            print(event.text, end="", flush=True)
        stream.output.finish_reasons
    """

    def __init__(
        self,
        call: Call,
        tokens_per_call: int,
        on_progress: Callable[[int], None] | None,
    ):
        self._call = call
        self._tokens_per_call = tokens_per_call
        self._on_progress = on_progress
        self._output: GenerateOutput | None = None
        self._error: BaseException | None = None
        self._begun = False
        self._events = self._run()
        # Reentrant, so that a progress callback that asks for an event gets an error
        # and not a deadlock.
        self._lock = threading.RLock()

    @property
    def output(self) -> GenerateOutput | None:
        """What `generate` would return; None until a loop over it has ended."""
        return self._output

    @property
    def stats(self) -> GenerateStats | None:
        """Figures of what has run so far; None before the first event."""
        with self._lock:
            if self._output is not None:
                return self._output.stats
            return self._call.stats(split=True) if self._begun else None

    def cancel(self) -> GenerateOutput:
        """Ends the stream after the tokens that have come; events not taken are lost.

        Returns:
          The output so far: sequences that had not ended are "cancelled", and its
          conversation goes on from there. A stream that has ended returns its output.

        Raises:
          ConfigError: If nothing has come yet, or the stream ended with an error.
        """
        with self._lock:
            if self._output is None:
                if self._error is not None or not self._begun:
                    raise ConfigError(
                        "cancel() is not allowed before the first event or after an "
                        "error: there is nothing to keep"
                    )
                self._events.close()
                self._output = self._call.output(split=True)
            return self._output

    def __repr__(self) -> str:
        end = "not finished" if self._output is None else f"finished: {self._output!r}"
        return f"Stream({self._call.batch} rows, {end})"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt: what the progress callback counts up to."""
        return max(len(row) for row in self._call.rows)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamEvent:
        with self._lock:
            if self._error is not None:
                raise RuntimeError(
                    "the stream does not go on: it ended with an error before"
                ) from self._error
            try:
                return next(self._events)
            except StopIteration:
                raise
            except BaseException as error:
                self._error = error
                raise

    def _run(self) -> Generator[StreamEvent]:
        call = self._call
        call.prefill(on_progress=self._on_progress)
        self._begun = True
        yield from call.take_events()
        while not call.finished:
            call.decode(self._tokens_per_call)
            yield from call.take_events()
        self._output = call.output(split=True)
