"""A batch of fixed shapes whose rows requests join and leave."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Unpack

import jax
import numpy as np

from sparda_jax.checks import ConfigError, integer, optional, require
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.generate_config import (
    GenerateConfig,
    GenerateOptions,
    merge_options,
)
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.placement import Placement, Sizes, place
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    PromptLike,
    check_max_context,
    encode_prompt,
    prefill_piece,
)
from sparda_jax.engine.results import StreamEvent, TokenLogprobs
from sparda_jax.engine.row_outputs import RowOutputs, row_tokens, token_logprobs
from sparda_jax.engine.row_request import RowOutput, RowRequest, joined_request
from sparda_jax.inference.generate import (
    GenerateState,
    Request,
    decode_loop,
    new_state,
    pad_rows,
    prefill_and_sample,
    prefill_and_sample_new,
)
from sparda_jax.inference.host_loop import decode_host_loop
from sparda_jax.inference.rows import (
    prefill_row_and_sample,
    prefill_row_and_score,
    reset_row,
)
from sparda_jax.models.rope import Rope, model_rope
from sparda_jax.planning.auto import on_demand

_PREFILLS = (prefill_and_sample, prefill_row_and_sample, prefill_row_and_score)


class Session:
    """A batch of fixed shapes whose rows requests join and leave.

    A request's tokens are those of `generate` with that request alone, whoever its
    neighbours are. After `warm_up` nothing is compiled, whatever comes:

        session = Session.open(lm, rows=8, max_context=4096)
        session.warm_up()
        row = session.join("Once upon a time", max_new_tokens=32)
        while not session.prefill(row):  # a piece of the prompt a call
            session.decode(4)  # the other rows go on
        while row in session.running:
            session.decode(4)
            events = list(session.take_events())
        output = session.leave(row)

    Threads: the calls of one session must not overlap; sessions share their programs.

    Attributes:
      lm: The model.
      rows: Rows of all arrays.
      shapes: Sizes of the programs.
      cache: Where the KV lives, `kind="auto"` decided.
      settings: The model and how to attend.
      rope: Rotary frequencies of all rows.
      compile_seconds: Time spent compiling so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        placement: Placement,
        rope: Rope,
        state: GenerateState | None = None,
    ):
        self.lm, self.rope = lm, rope
        self.rows, self.shapes = placement.rows, placement.shapes
        self.cache, self.settings = placement.cache, placement.settings
        self.compile_seconds = 0.0
        self._state = state
        self._programs: dict[Hashable, Callable] = {}
        self._given = RowOutputs(lm.tokenizer, self.rows)
        self._top_logprobs: int | None = None
        self._prompt_logs: dict[int, list[TokenLogprobs]] = {}
        self._request: Request | None = None
        # Rows that requests have joined, with what is left of their prompts.
        self._prompts: dict[int, list[int]] = {}
        self._open_rows = self._max_context = 0
        self._piece = self.shapes.prompt

    @staticmethod
    def open(
        lm: LanguageModel,
        *,
        rows: int,
        max_context: int | None = None,
        max_new_tokens: int = 512,
        prefill_chunk: int | None = 1024,
        top_logprobs: int | None = None,
    ) -> "Session":
        """A session of empty rows; allocates its cache.

        Args:
          lm: The model.
          rows: How many requests can run at a time.
          max_context: Tokens of a request, prompt and output together; None is the
            model's context. LongRoPE's factors are chosen for it.
          max_new_tokens: Most output tokens of a request.
          prefill_chunk: Tokens of a prompt that one call of `prefill` runs, and so the
            pause that a long prompt makes for the other rows; None is all of them.
          top_logprobs: Likeliest tokens that requests can ask the log-probabilities of,
            beside those of their own; None for no log-probabilities.

        Raises:
          ConfigError: If an argument is not allowed, or such a session cannot fit.
        """
        lm = LANGUAGE_MODEL("lm", lm)
        rows = integer(1, 2**16)("rows", rows)
        new = integer(1)("max_new_tokens", max_new_tokens)
        context = optional(integer(1))("max_context", max_context)
        top = optional(integer(0, 1024))("top_logprobs", top_logprobs)
        context = check_max_context(lm, context or lm.config.max_context, new + 1)
        # A prompt may be as long as the context but for one token of output.
        piece = prefill_piece(lm, context - 1, prefill_chunk)
        sizes = Sizes(
            batch=rows,
            chunk=piece,
            farthest_start=(context - 2) // piece * piece,
            longest=context - 1,
            max_new=new,
        )
        placement = place(lm, sizes, None, by_row=True)
        session = Session(lm, placement, model_rope(lm.config, context))
        session._open_rows, session._piece = rows, piece
        session._max_context, session._top_logprobs = context, top
        _ = session.state
        return session

    @property
    def free(self) -> list[int]:
        """Rows that a request can join."""
        return [row for row in range(self._open_rows) if row not in self._prompts]

    @property
    def running(self) -> list[int]:
        """Rows that the next decode step gives a token."""
        return np.flatnonzero(~np.asarray(self.state.done)).tolist()

    def join(
        self,
        prompt: PromptLike,
        config: GenerateConfig | None = None,
        *,
        logprobs: bool = False,
        score_prompt: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> int:
        """Gives a request a free row; `prefill` runs its prompt.

        Args:
          prompt: Text or token ids.
          config: What to ask for, one output with one seed.
          logprobs: Its events bring the log-probabilities of their tokens.
          score_prompt: So does `prompt_logprobs` those of the prompt's.
          **options: Fields of `GenerateConfig`, which go before those of `config`.
            `max_context` and `prefill_chunk` are the session's.

        Returns:
          The row.

        Raises:
          ConfigError: If no row is free, or the request is not allowed or too long.
        """
        config = merge_options(config, options)
        tokens = encode_prompt(self.lm, prompt, "prompt")
        require(config.n == 1, "n", config.n, "1: every output takes a row of its own")
        seed = integer(0)("seed", config.seed)
        room = "False: the session was opened without top_logprobs"
        has_room = self._top_logprobs is not None
        require(has_room or not logprobs, "logprobs", logprobs, room)
        require(has_room or not score_prompt, "score_prompt", score_prompt, room)
        new, limit = config.max_new_tokens, self._max_context
        require(
            new <= self.shapes.new,
            "max_new_tokens",
            new,
            f"at most {self.shapes.new}, the room of the session's rows",
        )
        if len(tokens) + new > limit:
            raise ConfigError(
                f"prompt has {len(tokens)} tokens, and max_new_tokens={new} more make "
                f"{len(tokens) + new}: at most {limit} fit a row of the session"
            )
        if not self.free:
            raise ConfigError(f"no row is free: all {self._open_rows} are taken")
        row = self.free[0]
        asked = RowRequest.of(self.lm, config, seed)
        self.ask(row, dataclasses.replace(asked, logprobs=logprobs))
        self._prompts[row] = tokens
        if score_prompt:
            self._prompt_logs[row] = []
        return row

    def prefill(self, row: int) -> bool:
        """Runs the next piece of a row's prompt.

        Returns:
          Whether that was the last one: the row has its first token, and takes part in
          decode steps if it goes on.
        """
        left = self._prompts.get(row)
        require(bool(left), "row", row, "a row whose prompt has not all run")
        assert left
        piece, rest = left[: self._piece], left[self._piece :]
        if row in self._prompt_logs:
            self._score_piece(row, piece, rest)
        else:
            self.prefill_row(row, piece, last=not rest)
        self._prompts[row] = rest
        if not rest:
            self.end_matched_rows()
        return not rest

    def _score_piece(self, row: int, piece: list[int], rest: list[int]) -> None:
        """`prefill_row`, with the log-probabilities of the tokens behind its own."""
        width = self.shapes.prompt
        following = [*piece[1:], *rest[:1]]
        padded = np.zeros(width, np.int32)
        padded[: len(following)] = following
        arguments = (
            pad_rows([piece], width),
            self.request(0, row=row, ends=[not rest]),
            jax.device_put(np.int32(row)),
            jax.device_put(padded),
        )
        static: dict[str, Hashable] = {"tile_size": self.shapes.tile}
        program, given = self._part(prefill_row_and_score, arguments, static)
        self._state, logs = program(*given)
        self._prompt_logs[row] += token_logprobs(logs, following)

    def leave(self, row: int) -> RowOutput:
        """Frees a row, whether it has ended or not, for the next request.

        Returns:
          What it has given. Its events that were not taken are lost.
        """
        require(row in self._prompts, "row", row, "a row that a request has joined")
        output = self.outputs()[row]
        at = jax.device_put(np.int32(row))
        program = self._program(reset_row, (self.state, at), donate=(0,))
        self._state = program(self.state, at)
        self.ask(row, RowRequest())
        del self._prompts[row]
        self._prompt_logs.pop(row, None)
        return output

    def warm_up(self) -> int:
        """Compiles all that requests need; returns how many programs that were.

        Raises:
          ConfigError: If requests have joined already.
        """
        require(not self._prompts, "warm_up()", "late", "before requests join")
        before = PROGRAMS.compiled
        kinds = (False,) if self._top_logprobs is None else (False, True)
        for score in kinds:
            row = self.join(
                [0],
                max_new_tokens=min(2, self.shapes.new),
                ignore_eos=True,
                score_prompt=score,
            )
            self.prefill(row)
            self.decode(1)
            self.leave(row)
        return PROGRAMS.compiled - before

    @property
    def state(self) -> GenerateState:
        """Where generation stands."""
        if self._state is None:
            state = new_state(
                self.lm.model,
                self.settings,
                self.rows,
                self.shapes,
                self.cache,
                top_logprobs=self._top_logprobs,
            )
            # Pinning host memory takes its time, which is no part of a prefill.
            self._state = jax.block_until_ready(state)
        return self._state

    def ask(self, row: int, request: RowRequest) -> None:
        """Says what a row's request asks for."""
        self._given.ask(row, request)
        self._request = None

    def request(
        self,
        steps: int,
        *,
        row: int | None = None,
        ends: Sequence[bool] | None = None,
    ) -> Request:
        """What a call asks for.

        Args:
          steps: Most tokens to decode.
          row: The only row that it is about; None for all.
          ends: Rows whose prompt ends with the call: the others sample nothing. None
            for all.
        """
        if row is not None:
            asked = [self._given.asked[row]]
            request = joined_request(self.lm, asked, self.rope)
        else:
            asked = self._given.asked
            if self._request is None:
                self._request = joined_request(self.lm, asked, self.rope)
            request = self._request
        ends = [True] * len(asked) if ends is None else ends
        pairs = zip(asked, ends, strict=True)
        limits = [one.max_new if end else 0 for one, end in pairs]
        return request._replace(
            max_new=jax.device_put(np.array(limits, np.int32)),
            steps=jax.device_put(np.int32(steps)),
        )

    def _program(
        self,
        function: Callable,
        arguments: tuple,
        *,
        donate: tuple[int, ...],
        **static: Hashable,
    ) -> Callable:
        """The compiled program of a function for this session."""
        settings = static.setdefault("settings", self.settings)
        # In one session the types of all arguments are the same in every call.
        program = self._programs.get((function, settings))
        if program is None:
            program, seconds = PROGRAMS.get(function, arguments, static, donate=donate)
            self._programs[function, settings] = program
            self.compile_seconds += seconds
        return program

    def run(self, function: Callable, *arguments: object, **static: Hashable) -> float:
        """Runs a part on the state; returns its seconds without compilation.

        A first call on a resident cache makes the empty state inside the program.
        """
        program, given = self._part(function, arguments, static)
        begun = time.perf_counter()
        self._state = program(*given)
        jax.block_until_ready(self._state.done)
        return time.perf_counter() - begun

    def _part(
        self, function: Callable, arguments: tuple, static: dict[str, Hashable]
    ) -> tuple[Callable, tuple]:
        """The program of a part, and what to call it with."""
        state: tuple[GenerateState, ...] = ()
        if function is not prefill_and_sample_new:
            state = (self.state,)
        if function in _PREFILLS:
            offload = self.settings.offload
            if offload is not None:
                # Prefill is the same program whether decode looks ahead or not.
                static["settings"] = dataclasses.replace(
                    self.settings, offload=on_demand(offload)
                )
        donate = (1,) if state else ()
        given = (self.lm.model, *state, *arguments)
        return self._program(function, given, donate=donate, **static), given

    def prefill_row(self, row: int, piece: Sequence[int], *, last: bool) -> float:
        """Runs a piece of one row's prompt in its place; returns the seconds."""
        return self.run(
            prefill_row_and_sample,
            pad_rows([list(piece)], self.shapes.prompt),
            self.request(0, row=row, ends=[last]),
            jax.device_put(np.int32(row)),
            tile_size=self.shapes.tile,
        )

    def prefill_together(
        self, pieces: Sequence[list[int]], *, ends: Sequence[bool], whole: bool
    ) -> float:
        """Runs a piece of every row's prompt in one call; returns the seconds.

        Args:
          pieces: Tokens of the first rows; those behind them get none.
          ends: Rows whose prompt ends with the call.
          whole: These are whole prompts.
        """
        padding = self.rows - len(pieces)
        prompt = pad_rows([*pieces, *[[]] * padding], self.shapes.prompt)
        request = self.request(0, ends=[*ends, *[True] * padding])
        if whole and self._state is None and self.settings.offload is None:
            return self.run(prefill_and_sample_new, prompt, request, shapes=self.shapes)
        tile = self.shapes.tile
        return self.run(prefill_and_sample, prompt, request, tile_size=tile)

    def decode(self, steps: int) -> float:
        """Decodes up to `steps` tokens of every row that has not ended.

        In as many calls as there are pauses for stop strings.

        Returns:
          Seconds without compilation.
        """
        seconds = 0.0
        while steps > 0 and not self.finished:
            before = np.asarray(self.state.generated)
            seconds += self._advance(steps)
            steps -= int(np.max(np.asarray(self.state.generated) - before))
            self.end_matched_rows()
        return seconds

    def _advance(self, steps: int) -> float:
        request, offload = self.request(steps), self.settings.offload
        if offload is None or offload.route.in_program:
            return self.run(decode_loop, request)
        begun = time.perf_counter()
        self._state = decode_host_loop(
            self.lm.model, self.state, request, settings=self.settings
        )
        jax.block_until_ready(self._state.done)
        return time.perf_counter() - begun

    @property
    def finished(self) -> bool:
        """Every row has ended."""
        return bool(np.all(np.asarray(self.state.done)))

    def tokens(self) -> list[list[int]]:
        """Output tokens of every row so far."""
        return row_tokens(self.state)

    @property
    def has_stop_strings(self) -> bool:
        """Whether a row ends at a text."""
        return self._given.has_stop_strings

    def end_matched_rows(self) -> None:
        """Ends the rows whose stop string is complete, if there are such strings."""
        if self.has_stop_strings:
            self._read()

    def _read(self) -> None:
        """Takes in the new tokens, and ends the rows whose stop string is complete."""
        done = self._given.read(self.state)
        if done is not None:
            self._state = self.state._replace(done=jax.device_put(done))

    def take_events(self) -> Iterator[StreamEvent]:
        """The tokens that have come since it was called last, with their texts.

        A row that has ended may have text left: then its last event has token −1.
        """
        self._read()
        yield from self._given.take_events()

    def prompt_logprobs(self, row: int) -> list[TokenLogprobs]:
        """Log-probabilities of a row's prompt but for its first token, as far as run.

        Of a request that joined with `score_prompt`.
        """
        return self._prompt_logs.get(row, [])

    def outputs(self) -> list[RowOutput]:
        """What every row has given so far."""
        self.end_matched_rows()
        return self._given.outputs(self.state)
