"""A batch of fixed shapes whose rows requests join and leave."""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any, Unpack

import jax
import numpy as np

from sparda_jax.checks import LARGEST_BYTES, ConfigError, integer, optional, require
from sparda_jax.engine.batch import Batch
from sparda_jax.engine.compile_cache import PROGRAMS, side_by_side
from sparda_jax.engine.generate_config import (
    GenerateConfig,
    GenerateOptions,
    merge_options,
)
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.placement import Placement, Sizes, place, refuse_in_session
from sparda_jax.engine.prefix_store import Piece, PrefixStore
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    PromptLike,
    check_max_context,
    encode_prompt,
    prefill_piece,
)
from sparda_jax.engine.results import TokenLogprobs
from sparda_jax.engine.row_outputs import token_logprobs
from sparda_jax.engine.row_request import RowOutput, RowRequest
from sparda_jax.inference.generate import decode_loop, pad_rows
from sparda_jax.inference.prefixes import end_prefix, put_prefix_blocks, take_prefix
from sparda_jax.inference.rows import (
    decode_row_loop,
    prefill_row_and_sample,
    prefill_row_and_score,
    reset_row,
)
from sparda_jax.inference.sampling import MOST_SEED
from sparda_jax.models.rope import model_rope

# Where the only row that goes on decodes by a program of its own: on a CPU a step is
# the longer the more rows it has; a GPU reads the weights.
ROW_ALONE_ON = frozenset({"cpu"})
_ROW = integer(0)
# Pieces of a prompt that one call takes from the store: the others wait for them.
_MOST_PIECES = 16


class Session(Batch):
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
    """

    def __init__(
        self,
        lm: LanguageModel,
        placement: Placement,
        *,
        rows: int,
        max_context: int,
        max_new: int,
        piece: int,
        top_logprobs: int | None,
        prefix_bytes: int,
    ):
        rope = model_rope(lm.config, max_context)
        super().__init__(lm, placement, rope, top_logprobs=top_logprobs)
        # Rows that requests have joined, with what is left of their prompts.
        self._prompts: dict[int, list[int]] = {}
        self._prompt_logs: dict[int, list[TokenLogprobs]] = {}
        self._open_rows, self._piece = rows, piece
        self._max_context, self._max_new = max_context, max_new
        self._store = PrefixStore(piece, prefix_bytes) if prefix_bytes else None
        # Whole prompts of the rows that may use the store, and where in it they stand.
        self._whole: dict[int, list[int]] = {}
        self._nodes: dict[int, Piece] = {}
        self._cached: dict[int, int] = {}
        if self.rows > 1 and lm.mesh is None and jax.default_backend() in ROW_ALONE_ON:
            self._places = [jax.device_put(np.int32(row)) for row in range(self.rows)]

    @staticmethod
    def open(
        lm: LanguageModel,
        *,
        rows: int,
        max_context: int | None = None,
        max_new_tokens: int = 512,
        prefill_chunk: int | None = 1024,
        top_logprobs: int | None = None,
        prefix_bytes: int = 0,
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
          prefix_bytes: Host memory for beginnings of prompts that further prompts may
            share (`engine.prefix_store`); 0 keeps none.

        Raises:
          ConfigError: If an argument is not allowed, or such a session cannot fit.
        """
        lm = LANGUAGE_MODEL("lm", lm)
        rows = integer(1, 2**16)("rows", rows)
        new = integer(1)("max_new_tokens", max_new_tokens)
        context = optional(integer(1))("max_context", max_context)
        top = optional(integer(0, 1024))("top_logprobs", top_logprobs)
        prefix = integer(0, LARGEST_BYTES)("prefix_bytes", prefix_bytes)
        refuse_in_session(lm.cache, lm.mesh)
        context = check_max_context(lm, context or lm.config.max_context, new + 1)
        # A prompt may be as long as the context but for one token of output.
        piece = prefill_piece(lm, context - 1, prefill_chunk)
        if piece >= context - 1:
            prefix = 0  # every prompt is one piece: there is no beginning of whole ones
        require(
            not prefix or piece % lm.sparse.block_size == 0,
            "prefill_chunk",
            piece,
            f"a multiple of {lm.sparse.block_size} tokens, a block, with prefix_bytes",
        )
        sizes = Sizes(
            batch=rows,
            chunk=piece,
            farthest_start=(context - 2) // piece * piece,
            longest=context - new,  # prompt and output together fill the context
            max_new=new,
        )
        placement = place(lm, sizes, None, by_row=True)
        session = Session(
            lm,
            placement,
            rows=rows,
            max_context=context,
            max_new=new,
            piece=piece,
            top_logprobs=top,
            prefix_bytes=prefix,
        )
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

    @property
    def max_context(self) -> int:
        """Tokens of a request, prompt and output together."""
        return self._max_context

    @property
    def max_new_tokens(self) -> int:
        """Most output tokens of a request."""
        return self._max_new

    def held_tokens(self) -> list[int]:
        """Tokens in the cache of each row."""
        return np.asarray(self.state.lengths).tolist()

    def check(
        self,
        prompt: PromptLike,
        config: GenerateConfig,
        *,
        logprobs: bool = False,
        score_prompt: bool = False,
    ) -> list[int]:
        """Refuses what `join` refuses whichever rows are free; from any thread.

        Args:
          prompt, config, logprobs, score_prompt: As there.

        Returns:
          The prompt's token ids.

        Raises:
          ConfigError: If the request is not allowed or too long.
        """
        tokens = encode_prompt(self.lm, prompt, "prompt")
        require(config.n == 1, "n", config.n, "1: every output takes a row of its own")
        seed = integer(0, MOST_SEED)("seed", config.seed)
        room = "False: the session was opened without top_logprobs"
        has_room = self._top_logprobs is not None
        require(has_room or not logprobs, "logprobs", logprobs, room)
        require(has_room or not score_prompt, "score_prompt", score_prompt, room)
        new, limit = config.max_new_tokens, self._max_context
        require(
            new <= self._max_new,
            "max_new_tokens",
            new,
            f"at most {self._max_new}, what the session was opened for",
        )
        if len(tokens) + new > limit:
            raise ConfigError(
                f"prompt has {len(tokens)} tokens, and max_new_tokens={new} more make "
                f"{len(tokens) + new}: at most {limit} fit a row of the session"
            )
        RowRequest.of(self.lm, config, seed)
        return tokens

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
        tokens = self.check(
            prompt, config, logprobs=logprobs, score_prompt=score_prompt
        )
        if not self.free:
            raise ConfigError(f"no row is free: all {self._open_rows} are taken")
        row = self.free[0]
        asked = RowRequest.of(
            self.lm, config, integer(0, MOST_SEED)("seed", config.seed)
        )
        self.ask(row, dataclasses.replace(asked, logprobs=logprobs))
        self._prompts[row] = tokens
        self._cached[row] = 0
        if score_prompt:
            self._prompt_logs[row] = []
        elif self._store is not None:
            self._whole[row], self._nodes[row] = tokens, self._store.root
        return row

    def prefill(self, row: int) -> bool:
        """Runs the next piece of a row's prompt, or takes some from the prefix store.

        Returns:
          Whether that was the last one: the row has its first token, and takes part in
          decode steps if it goes on.
        """
        row = _ROW("row", row)
        left = self._prompts.get(row)
        require(bool(left), "row", row, "a row whose prompt has not all run")
        assert left
        if self._take_pieces(row, left):
            return False
        piece, rest = left[: self._piece], left[self._piece :]
        if row in self._prompt_logs:
            self._score_piece(row, piece, rest)
        else:
            self.prefill_row(row, piece, last=not rest)
        self._prompts[row] = rest
        if rest:
            self._keep_piece(row, piece)
        else:
            self.end_matched_rows()
        return not rest

    def _take_pieces(self, row: int, left: list[int]) -> bool:
        """Takes what the store has of the rest of a prompt; returns whether it had."""
        node, store = self._nodes.get(row), self._store
        if node is None or store is None or not store.holds(node):
            return False
        found = store.follow(node, left, _MOST_PIECES)
        if not found:
            return False
        whole = self._whole[row]
        at, begin = jax.device_put(np.int32(row)), len(whole) - len(left)
        for number, piece in enumerate(found):
            first = (begin + number * self._piece) // self.lm.sparse.block_size
            place = jax.device_put(np.int32(first))
            arguments = (self.state, jax.device_put(piece.blocks), at, place)
            program = self._program(put_prefix_blocks, arguments, donate=(0,))
            self._state = program(*arguments)
        length = begin + len(found) * self._piece
        seen = np.zeros(self.lm.config.vocab_size, bool)
        seen[whole[:length]] = True
        arguments = (
            self.state,
            jax.device_put(found[-1].index),
            at,
            jax.device_put(np.int32(length)),
            jax.device_put(seen),
        )
        program = self._program(end_prefix, arguments, donate=(0,))
        self._state = program(*arguments)
        self._prompts[row] = whole[length:]
        self._nodes[row] = found[-1]
        self._cached[row] += len(found) * self._piece
        return True

    def _keep_piece(self, row: int, piece: list[int]) -> None:
        """Lets the store have a piece that has just run, if it goes on from there."""
        node, store = self._nodes.pop(row, None), self._store
        if node is None or store is None or not store.holds(node):
            return
        block = self.lm.sparse.block_size
        behind = len(self._whole[row]) - len(self._prompts[row])
        first = (behind - self._piece) // block
        arguments = (
            self.state,
            jax.device_put(np.int32(row)),
            jax.device_put(np.int32(first)),
        )
        program = self._program(
            take_prefix, arguments, donate=(), count=self._piece // block
        )
        kept = store.add(node, piece, *program(*arguments))
        if kept is not None:
            self._nodes[row] = kept

    def cached_tokens(self, row: int) -> int:
        """Tokens of a row's prompt that came from the prefix store."""
        return self._cached.get(_ROW("row", row), 0)

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
        row = _ROW("row", row)
        require(row in self._prompts, "row", row, "a row that a request has joined")
        output = self.outputs()[row]
        at = jax.device_put(np.int32(row))
        program = self._program(reset_row, (self.state, at), donate=(0,))
        self._state = program(self.state, at)
        self.ask(row, RowRequest())
        del self._prompts[row]
        for kept in (self._prompt_logs, self._whole, self._nodes, self._cached):
            kept.pop(row, None)
        return output

    def warm_up(self) -> int:
        """Compiles all that requests need; returns how many programs that were.

        Raises:
          ConfigError: If requests have joined already.
        """
        require(not self._prompts, "warm_up()", "late", "before requests join")
        before = PROGRAMS.compiled
        if self.lm.mesh is None:
            self.compile_programs()
        kinds = (False,) if self._top_logprobs is None else (False, True)
        for score in kinds:
            row = self.join(
                [0],
                max_new_tokens=min(2, self._max_new),
                ignore_eos=True,
                score_prompt=score,
            )
            self.prefill(row)
            self._warm_up_decode()
            self.leave(row)
        if self._store is not None:
            self._warm_up_store(self._store)
        return PROGRAMS.compiled - before

    def compile_programs(self) -> None:
        """Compiles all that requests need side by side, as `warm_up` begins with."""
        shapes, state, at = self.shapes, self.state, jax.device_put(np.int32(0))
        prompt = pad_rows([[0]], shapes.prompt)
        prefill = (prompt, self.request(0, row=0, ends=[True]), at)
        begun, before = time.perf_counter(), self.compile_seconds
        with side_by_side() as start:

            def part(function: Callable, *given: object, **static: Hashable) -> None:
                start(self._part, function, given, static)

            def change(function: Callable, *given: object, **more: Any) -> None:
                more.setdefault("donate", (0,))
                start(self._program, function, (state, *given), **more)

            part(prefill_row_and_sample, *prefill, tile_size=shapes.tile)
            if self._top_logprobs is not None:
                following = jax.device_put(np.zeros(shapes.prompt, np.int32))
                part(prefill_row_and_score, *prefill, following, tile_size=shapes.tile)
            if self._in_program:
                part(decode_loop, self.request(0))
                if self._places:
                    part(decode_row_loop, self.request(0, row=0), at)
            change(reset_row, at)
            if self._store is not None:
                count = self._piece // self.lm.sparse.block_size
                change(take_prefix, at, at, donate=(), count=count)
                take = functools.partial(
                    take_prefix, settings=self.settings, count=count
                )
                blocks, index = jax.tree.map(
                    lambda x: jax.device_put(np.zeros(x.shape, x.dtype)),
                    jax.eval_shape(take, state, at, at),
                )
                seen = jax.device_put(np.zeros(self.lm.config.vocab_size, bool))
                change(put_prefix_blocks, blocks, at, at)
                change(end_prefix, index, at, at, seen)
        self.compile_seconds = before + time.perf_counter() - begun

    def _warm_up_decode(self) -> None:
        """Decodes a token of the row alone, if rows do, and no more of all rows."""
        self.decode(1)
        if self._places and self._in_program:
            self.run(decode_loop, self.request(0))

    def _warm_up_store(self, store: PrefixStore) -> None:
        """Puts a piece into the store and takes it out again."""
        for _ in range(2):
            row = self.join([0] * (self._piece + 1), max_new_tokens=1)
            while not self.prefill(row):
                pass
            self.leave(row)
        require(
            len(store) > 0,
            "prefix_bytes",
            store.most_bytes,
            "0, or enough for a piece of prefill_chunk tokens with its index",
        )
        store.clear()

    def prompt_logprobs(self, row: int) -> list[TokenLogprobs]:
        """Log-probabilities of a row's prompt but for its first token, as far as run.

        Of a request that joined with `score_prompt`.
        """
        return self._prompt_logs.get(_ROW("row", row), [])
