"""A batch of fixed shapes: its state, and the programs that run on it."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sparda_jax.checks import integer
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.on_mesh import (
    StateLayout,
    new_mesh_state,
    on_devices,
    place_request,
)
from sparda_jax.engine.placement import Placement, state_layout
from sparda_jax.engine.results import StreamEvent
from sparda_jax.engine.row_outputs import RowOutputs, row_tokens
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
    decode_row_loop,
    prefill_row_and_sample,
    prefill_row_and_score,
)
from sparda_jax.models.rope import Rope
from sparda_jax.planning.auto import on_demand

_PREFILLS = (prefill_and_sample, prefill_row_and_sample, prefill_row_and_score)


@dataclasses.dataclass(frozen=True)
class _OfWeights:
    """A function of (model, ...) that takes the model's arrays as a plain list.

    A module of many layers takes a millisecond to flatten, each time that a program is
    called with it.
    """

    function: Callable
    tree: jax.tree_util.PyTreeDef

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def compiler_options(self) -> dict[str, bool] | None:
        """Those of the function."""
        return getattr(self.function, "compiler_options", None)

    def __call__(self, weights: list[jax.Array], *others: Any, **static: Any) -> Any:
        model = jax.tree.unflatten(self.tree, weights)
        return self.function(model, *others, **static)


class Batch:
    """A batch of fixed shapes: its state, and the programs that run on it.

    Threads: the calls of one batch must not overlap; batches share their programs.

    Attributes:
      lm: The model.
      rows: Rows of all arrays.
      shapes: Sizes of the programs.
      cache: Where the KV lives, `kind="auto"` decided.
      settings: The model and how to attend.
      rope: Rotary frequencies of all rows.
      compile_seconds: Time spent compiling so far.

    Args:
      lm: The model.
      placement: Where and in which sizes to run.
      rope: Rotary frequencies of all rows.
      state: Where generation stands; None for an empty state.
      top_logprobs: Likeliest tokens that requests can ask the log-probabilities of;
        None for no log-probabilities.
    """

    def __init__(
        self,
        lm: LanguageModel,
        placement: Placement,
        rope: Rope,
        state: GenerateState | None = None,
        *,
        top_logprobs: int | None = None,
    ):
        self.lm, self.rope = lm, rope
        self.rows, self.shapes = placement.rows, placement.shapes
        self.cache, self.settings = placement.cache, placement.settings
        self.compile_seconds = 0.0
        self._weights, self._tree = jax.tree.flatten(lm.model)
        self._state = state
        self._layout = state_layout(lm, placement, top_logprobs)
        self._programs: dict[tuple[Callable, Hashable], Callable] = {}
        self._given = RowOutputs(lm.tokenizer, self.rows)
        self._top_logprobs = top_logprobs
        # Of one row, or of all, to the end, by steps: decode asks again and again.
        self._requests: dict[tuple[int | None, int], Request] = {}
        # Of any steps: requests of other steps share all other arrays, as CUDA graphs
        # are recorded anew where an array is another than at the call before.
        self._joined: dict[int | None, Request] = {}
        # By row, where the only row that goes on decodes alone; none where all do.
        self._places: list[jax.Array] = []

    @property
    def layout(self) -> StateLayout | None:
        """Of the state's arrays; None on one device."""
        return self._layout

    @property
    def programs(self) -> list[str]:
        """Names of the programs that it has run."""
        return sorted(function.__name__ for function, _ in self._programs)

    @property
    def state(self) -> GenerateState:
        """Where generation stands."""
        if self._state is None:
            if self._layout is not None:
                state = new_mesh_state(self._layout)
            else:
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
        self._joined.clear()
        self._requests.clear()

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
        key = (row, steps)
        if ends is None and key in self._requests:
            return self._requests[key]
        asked = self._given.asked if row is None else [self._given.asked[row]]
        if row not in self._joined:
            self._joined[row] = self._placed(joined_request(self.lm, asked, self.rope))
        request = self._joined[row]._replace(steps=jax.device_put(np.int32(steps)))
        if ends is not None:
            pairs = zip(asked, ends, strict=True)
            limits = np.array([one.max_new if end else 0 for one, end in pairs])
            request = request._replace(max_new=jax.device_put(limits.astype(np.int32)))
        request = self._placed(request)  # what has changed of it
        if ends is None:
            self._requests[key] = request
        return request

    def _placed(self, request: Request) -> Request:
        """The request on the devices of a mesh, if there is one."""
        if self._layout is None:
            return request
        return place_request(request, self._layout)

    def _program(
        self,
        function: Callable,
        arguments: tuple,
        *,
        donate: tuple[int, ...],
        of_weights: bool = False,
        **static: Hashable,
    ) -> Callable:
        """The compiled program of a function for this session."""
        settings = static.setdefault("settings", self.settings)
        # In one session the types of all arguments are the same in every call.
        program = self._programs.get((function, settings))
        if program is None:
            own = on_devices(self.lm, function, self._layout)
            program, seconds = PROGRAMS.get(
                _OfWeights(own, self._tree) if of_weights else own,
                arguments,
                static,
                donate=donate,
            )
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
        self._copy_to_host()
        jax.block_until_ready(self._state.done)
        return time.perf_counter() - begun

    def _copy_to_host(self) -> None:
        """Has what is looked at between two calls brought to the host, all at once."""
        if jax.default_backend() == "cpu":
            return  # it is there
        state = self.state
        for looked_at in (state.done, state.generated, state.tokens):
            looked_at.copy_to_host_async()

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
        given = (self._weights, *state, *arguments)
        program = self._program(
            function, given, donate=donate, of_weights=True, **static
        )
        return program, given

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

        Raises:
          ConfigError: If `steps` is no integer of at least 0.
        """
        steps, seconds = integer(0)("steps", steps), 0.0
        while steps > 0 and not self.finished:
            before = np.asarray(self.state.generated)
            seconds += self._advance(steps)
            steps -= int(np.max(np.asarray(self.state.generated) - before))
            self.end_matched_rows()
        return seconds

    @property
    def _in_program(self) -> bool:
        """Whether decode is one program, not a call a layer."""
        offload = self.settings.offload
        return offload is None or offload.route.in_program

    @property
    def _alone(self) -> int | None:
        """The only row that goes on, if it decodes alone.

        Its last bits are then not those that it has among others: whoever asks for
        log-probabilities gets the same, whoever comes and goes.
        """
        if not self._places or not self._in_program:
            return None
        going = np.flatnonzero(~np.asarray(self.state.done)).tolist()
        alone = len(going) == 1 and not self._given.asked[going[0]].logprobs
        return going[0] if alone else None

    def _advance(self, steps: int) -> float:
        row = self._alone
        if row is not None:
            request, place = self.request(steps, row=row), self._places[row]
            return self.run(decode_row_loop, request, place)
        request = self.request(steps)
        if self._in_program:
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

    def outputs(self) -> list[RowOutput]:
        """What every row has given so far."""
        self.end_matched_rows()
        return self._given.outputs(self.state)
