"""One call of `generate` or `stream`: shapes, compilations, state and figures."""

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator

import jax
import numpy as np

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.checks import instance, optional
from sparda_jax.config import ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS, signature
from sparda_jax.engine.conversation import Conversation, MadeWith
from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.offload_stats import OffloadStats, offload_stats
from sparda_jax.engine.placement import Sizes, place
from sparda_jax.engine.prefetch_trial import PROBES, PrefetchTrial
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    Prompts,
    check_length,
    check_max_context,
    encode_prompt,
    prefill_piece,
    repeat_prompts,
    without_effect,
)
from sparda_jax.engine.results import (
    GenerateOutput,
    GenerateStats,
    StreamEvent,
)
from sparda_jax.engine.stop_strings import (
    RowText,
    check_stop,
    pause_tokens,
    special_ids,
)
from sparda_jax.inference.generate import (
    GenerateState,
    Prompt,
    Request,
    decode_loop,
    generate_loop,
    new_state,
    next_turn,
    pad_rows,
    prefill_and_sample,
    prefill_and_sample_new,
    stop_array,
)
from sparda_jax.inference.host_loop import decode_host_loop
from sparda_jax.inference.sampling import sampling_state
from sparda_jax.models.rope import model_rope
from sparda_jax.planning.auto import Probe, fetch_rate, hidden_share, on_demand


class Session:
    """One generate or stream call: checked arguments, shapes, state and timing."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Prompts,
        config: GenerateConfig,
        conversation: Conversation | None = None,
    ):
        lm = LANGUAGE_MODEL("lm", lm)
        conversation = optional(instance(Conversation))("conversation", conversation)
        prompts, seeds = repeat_prompts(prompts, config.seed, config.n)
        max_new_tokens, max_context = config.max_new_tokens, config.max_context
        self.lm, self.max_new_tokens = lm, max_new_tokens
        batch = len(prompts)
        rows = [
            encode_prompt(lm, prompt, f"prompts[{index}]", begins=conversation is None)
            for index, prompt in enumerate(prompts)
        ]
        held = (0,) * batch
        if conversation is not None:
            conversation.check(lm, batch)
            held = conversation.lengths
            # The last token of the turn before was sampled but never fed.
            pending = np.asarray(conversation.state.pending)
            rows = [[int(pending[i]), *row] for i, row in enumerate(rows)]
        totals = [h + len(row) for h, row in zip(held, rows, strict=True)]
        for index, total in enumerate(totals):
            check_length(lm, total, max_new_tokens, f"prompts[{index}]")
        self.rope_length = max(totals) + max_new_tokens
        if max_context is not None:
            self.rope_length = check_max_context(lm, max_context, self.rope_length)
        if conversation is not None:
            original = lm.config.rope.original_max
            crosses = (
                lm.config.rope.kind == "longrope"
                and original is not None
                and conversation.rope_length <= original < self.rope_length
            )
            if crosses:
                raise ConfigError(
                    f"this turn reaches {self.rope_length} tokens, and the "
                    "conversation was begun with LongRoPE's short factors (up to "
                    f"{original}): begin it with max_context set to its final length"
                )
            if conversation.rope_length > self.rope_length:
                self.rope_length = conversation.rope_length
        eos = () if config.ignore_eos else lm.config.eos_ids
        stops = {*config.stop_ids, *eos}
        self.stop_strings = tuple(config.stop)
        check_stop(lm, self.stop_strings)
        stops |= special_ids(lm.tokenizer, self.stop_strings)
        self.stops = stop_array(stops, lm.config)
        self.pause = pause_tokens(lm, self.stop_strings)
        self.texts = [RowText(lm.tokenizer, self.stop_strings) for _ in rows]
        self._num_read = [0] * batch
        self._events: collections.deque[StreamEvent] = collections.deque()
        self.rope = model_rope(lm.config, self.rope_length)
        self.rows, self.held, self.batch = rows, held, batch
        self.notes = without_effect(lm, max_context, config.prefill_chunk)
        self.chunk = prefill_piece(lm, max(map(len, rows)), config.prefill_chunk)
        self._place(conversation, max_new_tokens)
        self.sampling = sampling_state(config.sampling, seeds, batch, rows=self.padded)
        # Rows of padding have no tokens, and end at none.
        self.max_new = np.zeros(self.padded, np.int32)
        self.max_new[:batch] = max_new_tokens
        self._programs: dict[Hashable, Callable] = {}
        self.compile_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._state: GenerateState | None = None
        if conversation is not None:
            self._state = next_turn(
                conversation.take(), self.shapes, self.settings, self.cache
            )

    def _place(self, conversation: Conversation | None, max_new: int) -> None:
        """Settles where and in which sizes the call runs."""
        longest = max(map(len, self.rows))
        last = (longest - 1) // self.chunk * self.chunk
        pairs = list(zip(self.held, self.rows, strict=True))
        sizes = Sizes(
            batch=self.batch,
            chunk=self.chunk,
            farthest_start=max(held + min(len(row), last) for held, row in pairs),
            longest=max(held + len(row) for held, row in pairs),
            max_new=max_new,
        )
        placement = place(self.lm, sizes, conversation)
        self.padded, self.shapes = placement.rows, placement.shapes
        self.cache, self.settings = placement.cache, placement.settings
        self.notes += placement.notes
        self._trial: PrefetchTrial | None = None
        offload = self.settings.offload
        if self.cache.prefetch != "auto" or offload is None:
            return
        if not offload.lookahead:
            self.notes.append("on demand: this attention makes no forecast")
            return
        # Until it is decided decode runs on demand.
        self._ahead = self.settings
        self.settings = dataclasses.replace(self._ahead, offload=on_demand(offload))
        known = PROBES.get(self._probe_key())
        if known is None:
            self._trial = PrefetchTrial()
        else:
            self._settle(known)

    @property
    def state(self) -> GenerateState:
        """Where generation stands."""
        if self._state is None:
            state = new_state(
                self.lm.model, self.settings, self.padded, self.shapes, self.cache
            )
            # Pinning host memory takes its time, which is no part of a prefill.
            self._state = jax.block_until_ready(state)
        return self._state

    def _probe_key(self) -> Hashable:
        types = signature(self.lm.model)
        return types, self._ahead, self.cache, self.padded, self.shapes

    def _settle(self, probe: Probe) -> None:
        self._trial = None
        self.notes.append(probe.reason())
        if probe.look_ahead:
            self.settings = self._ahead

    def _decode_trial(self, trial: PrefetchTrial, steps: int) -> int:
        """One call of the first steps, measured; returns the steps left."""
        taken = trial.most(steps)
        before = (self.decode_seconds, self._fetched(), self._longest())
        self._decode(taken)
        done = self._longest() - before[2]
        trial.add(done, self.decode_seconds - before[0], self._fetched() - before[1])
        if not trial.complete:
            return steps - taken
        cache, offload = self.state.cache, self.settings.offload
        assert isinstance(cache, OffloadCache) and offload is not None
        block, _, head_dim = cache.store.block_shape
        block_bytes = cache.store.bytes_per_block
        probe = Probe(
            step_seconds=trial.seconds / trial.timed,
            missed_bytes=trial.fetched * block_bytes / trial.timed,
            fetch_rate=fetch_rate(offload.route, block, head_dim, cache.store.dtype),
            hidden=hidden_share(offload.route),
        )
        PROBES.put(self._probe_key(), probe)
        self._settle(probe)
        return steps - taken

    def _fetched(self) -> int:
        return int(np.sum(self.state.fetches.fetched.to_numpy()))

    def _longest(self) -> int:
        return int(np.max(np.asarray(self.state.generated)))

    def request(self, steps: int, max_new: np.ndarray) -> Request:
        """Sampling and limits of one call; `max_new` is int32 [rows]."""
        return Request(
            sampling=self.sampling,
            stops=self.stops,
            max_new=jax.device_put(max_new),
            steps=jax.device_put(np.int32(steps)),
            rope=self.rope,
            pause=self.pause,
        )

    def _call(
        self, function: Callable, *arguments: Prompt | Request, **static: Hashable
    ) -> float:
        """Runs a part on the state; returns its seconds without compilation.

        A first call on a resident cache makes the empty state inside the program.
        """
        model, settings = self.lm.model, self.settings
        state: tuple[GenerateState, ...] = ()
        if function is not prefill_and_sample_new:
            state = (self.state,)
        if function is prefill_and_sample and settings.offload is not None:
            # Prefill is the same program whether decode looks ahead or not.
            offload = on_demand(settings.offload)
            settings = dataclasses.replace(settings, offload=offload)
        # In one session the types of all arguments are the same in every call.
        program = self._programs.get((function, settings))
        if program is None:
            program, seconds = PROGRAMS.get(
                function,
                (model, *state, *arguments),
                {"settings": settings, **static},
                donate=(1,) if state else (),
            )
            self._programs[function, settings] = program
            self.compile_seconds += seconds
        begun = time.perf_counter()
        self._state = program(model, *state, *arguments)
        jax.block_until_ready(self._state.done)
        return time.perf_counter() - begun

    def prefill(self, *, on_progress: Callable[[int], None] | None = None) -> None:
        """Runs the prompt (in chunks) and samples the first token of every row."""
        longest = max(len(row) for row in self.rows)
        rows = [*self.rows, *[[]] * (self.padded - self.batch)]
        function, static = prefill_and_sample, {"tile_size": self.shapes.tile}
        whole = longest <= self.chunk and self.settings.offload is None
        if self._state is None and whole:
            function, static = prefill_and_sample_new, {"shapes": self.shapes}
        for first in range(0, longest, self.chunk):
            pieces = [row[first : first + self.chunk] for row in rows]
            # A row samples its first token with the last chunk of its prompt.
            last = np.array([len(row) <= first + self.chunk for row in rows])
            prompt = pad_rows(pieces, self.shapes.prompt)
            request = self.request(0, np.where(last, self.max_new, 0).astype(np.int32))
            self.prefill_seconds += self._call(function, prompt, request, **static)
            if on_progress is not None:
                on_progress(max(len(piece) for piece in pieces))
        if self.stop_strings:
            self._read()

    def decode(self, steps: int) -> None:
        """Decodes up to `steps` more tokens."""
        while self._trial is not None and steps > 0 and not self.finished:
            steps = self._decode_trial(self._trial, steps)
        if steps > 0:
            self._decode(steps)

    def _decode(self, steps: int) -> None:
        """`decode`, in as many calls as there are pauses for stop strings."""
        while steps > 0 and not self.finished:
            before = np.asarray(self.state.generated)
            self._advance(steps)
            steps -= int(np.max(np.asarray(self.state.generated) - before))
            if self.stop_strings:
                self._read()

    def _read(self) -> None:
        """Takes in the new tokens, and ends the rows whose stop string is complete.

        Decoding pauses after every token that may complete one, so these rows have no
        token behind it.
        """
        done = np.array(self.state.done)
        for index, row in enumerate(self.tokens()):
            text = self.texts[index]
            for token in row[self._num_read[index] :]:
                self._events.append(StreamEvent(index, token, text.push(token)))
            self._num_read[index] = len(row)
            done[index] |= text.matched
            rest = text.flush() if done[index] else ""
            if rest:
                self._events.append(StreamEvent(index, -1, rest))
        if self.stop_strings:
            self._state = self.state._replace(done=jax.device_put(done))

    def take_events(self) -> Iterator[StreamEvent]:
        """The tokens that have come since it was called last, with their texts.

        A row that has ended may have text left: then its last event has token −1.
        """
        self._read()
        while self._events:
            yield self._events.popleft()

    def _advance(self, steps: int) -> None:
        request = self.request(steps, self.max_new)
        offload = self.settings.offload
        if offload is not None and not offload.route.in_program:
            begun = time.perf_counter()
            self._state = decode_host_loop(
                self.lm.model, self.state, request, settings=self.settings
            )
            jax.block_until_ready(self._state.done)
            self.decode_seconds += time.perf_counter() - begun
            return
        self.decode_seconds += self._call(decode_loop, request)

    def whole(self) -> None:
        """Prompt and all tokens in one call."""
        if self._trial is not None:
            raise ConfigError(
                "single_call=True is not allowed with CacheConfig.prefetch='auto', "
                "which measures the first steps: use 'lookahead' or 'none'"
            )
        if self.chunk < max(len(row) for row in self.rows):
            raise ConfigError(
                "single_call=True is not allowed with a prefill_chunk that cuts the "
                "prompt"
            )
        offload = self.settings.offload
        if offload is not None and not offload.route.in_program:
            raise ConfigError(
                "single_call=True is not allowed with "
                f"CacheConfig.route={offload.route.name!r}: that route is a call a "
                "layer"
            )
        if self.stop_strings:
            raise ConfigError(
                "single_call=True is not allowed with stop: the text is looked at "
                "between calls"
            )
        rows = [*self.rows, *[[]] * (self.padded - self.batch)]
        prompt = pad_rows(rows, self.shapes.prompt)
        request = self.request(int(self.max_new[0]), self.max_new)
        tile = self.shapes.tile
        self.prefill_seconds += self._call(
            generate_loop, prompt, request, tile_size=tile
        )

    @property
    def finished(self) -> bool:
        """Every row has ended."""
        return bool(np.all(np.asarray(self.state.done)))

    def tokens(self) -> list[list[int]]:
        """Output tokens so far."""
        tokens = np.asarray(self.state.tokens)[: self.batch]
        counts = np.asarray(self.state.generated)[: self.batch]
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    def _offload_stats(self) -> OffloadStats | None:
        cache, offload = self.state.cache, self.settings.offload
        if offload is None or not isinstance(cache, OffloadCache):
            return None
        block_bytes = cache.store.bytes_per_block
        return offload_stats(self.state.fetches, offload, block_bytes=block_bytes)

    def stats(self, *, split: bool) -> GenerateStats:
        """Figures of what has run so far."""
        state = self.state
        blocks = [
            counts.to_ints() for counts in (state.prefill_counts, state.decode_counts)
        ]
        notes = list(self.notes)
        if self._trial is not None:
            notes.append(self._trial.unfinished())
        prefill_seconds, decode_seconds = self.prefill_seconds, self.decode_seconds
        return GenerateStats(
            prompt_tokens=sum(len(row) for row in self.rows),
            new_tokens=int(np.sum(np.asarray(state.generated)[: self.batch])),
            batch=self.batch,
            prefill_seconds=prefill_seconds if split else None,
            decode_seconds=decode_seconds if split else None,
            total_seconds=prefill_seconds + decode_seconds,
            compile_seconds=self.compile_seconds,
            prefill_blocks=blocks[0],
            decode_blocks=blocks[1],
            offload=self._offload_stats(),
            policy="; ".join(notes),
        )

    def output(self, *, split: bool) -> GenerateOutput:
        """The result after the last call; of a row that has not ended, what it has."""
        tokens = self.tokens()
        stops = {int(token) for token in np.asarray(self.stops)}
        tokenizer = self.lm.tokenizer
        texts = [] if tokenizer is None else [tokenizer.decode(row) for row in tokens]
        if self.stop_strings:
            texts = [text.text for text in self.texts]
        state = self.state
        lengths = np.asarray(state.lengths)[: self.batch].tolist()
        broken = np.asarray(state.broken)[: self.batch]
        done = np.asarray(state.done)[: self.batch]
        return GenerateOutput(
            tokens=tokens,
            texts=texts,
            finish_reasons=[
                "non_finite"
                if bad
                else "stop"
                if row[-1] in stops or text.matched
                else "length"
                if ended
                else "cancelled"
                for row, text, bad, ended in zip(
                    tokens, self.texts, broken, done, strict=True
                )
            ],
            stats=self.stats(split=split),
            conversation=Conversation(
                state,
                tuple(lengths),
                self.rope_length,
                MadeWith.of(self.lm, self.cache),
            ),
        )
