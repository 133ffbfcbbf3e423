"""One call of `generate` or `stream`: shapes, compilations, state and figures."""

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.checks import flag, instance, integer, optional, several
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS, BoundedCache, signature
from sparda_jax.engine.conversation import Conversation, MadeWith
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.offload_stats import OffloadStats, offload_stats
from sparda_jax.engine.requests import (
    LANGUAGE_MODEL,
    Prompts,
    check_length,
    encode_prompt,
    prompt_rows,
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
    Prompt,
    Request,
    advance,
    begin,
    new_state,
    next_turn,
    pad_rows,
    plan_shapes,
    run,
    stop_array,
)
from sparda_jax.inference.host_loop import decode_host_loop
from sparda_jax.inference.sampling import SamplingConfig, sampling_state
from sparda_jax.models.rope import model_rope
from sparda_jax.planning.auto import (
    PROBE_TIMED,
    PROBE_WARM,
    Probe,
    fetch_rate,
    hidden_share,
    offload_settings,
    on_demand,
)
from sparda_jax.planning.limits import refuse_what_cannot_fit, why_not

# What the first steps of `prefetch="auto"` showed, by all that the programs depend on.
_PROBES: BoundedCache[Probe] = BoundedCache(256)


class Session:
    """One generate or stream call: checked arguments, shapes, state and timing."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int | Sequence[int],
        stop: str | Sequence[str],
        stop_ids: Sequence[int],
        ignore_eos: bool,
        conversation: Conversation | None,
        max_context: int | None,
        prefill_chunk: int | None,
    ):
        lm = LANGUAGE_MODEL("lm", lm)
        conversation = optional(instance(Conversation))("conversation", conversation)
        max_new_tokens = integer(1)("max_new_tokens", max_new_tokens)
        max_context = optional(integer(1))("max_context", max_context)
        prefill_chunk = optional(integer(1))("prefill_chunk", prefill_chunk)
        stop_ids = several(integer(0), "token ids")("stop_ids", stop_ids)
        ignore_eos = flag("ignore_eos", ignore_eos)
        prompts = prompt_rows(prompts)
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
        self.rope_length = max(max(totals) + max_new_tokens, max_context or 0)
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
        stops = set(stop_ids) | (set() if ignore_eos else set(lm.config.eos_ids))
        self.stop_strings = check_stop(lm, stop)
        stops |= special_ids(lm.tokenizer, self.stop_strings)
        self.stops = stop_array(stops, lm.config)
        self.pause = pause_tokens(lm, self.stop_strings)
        self.texts = [RowText(lm.tokenizer, self.stop_strings) for _ in rows]
        self._num_read = [0] * batch
        self._events: collections.deque[StreamEvent] = collections.deque()
        self.sampling = sampling_state(sampling, seed, batch)
        self.max_new = jnp.full((batch,), max_new_tokens, jnp.int32)
        self.rope = model_rope(lm.config, self.rope_length)
        self.rows, self.held, self.batch = rows, held, batch

        longest = max(len(row) for row in rows)
        # Cutting a prompt changes nothing, unless rows switch to dense attention by
        # length or windows reach past their query (parity settings).
        chunkable = lm.sparse.dense_len <= 0 and lm.sparse.mask_future_blocks
        self.chunk = longest
        if prefill_chunk is not None and chunkable:
            self.chunk = min(longest, prefill_chunk)
        last = (longest - 1) // self.chunk * self.chunk
        self.shapes = plan_shapes(
            self.chunk,
            farthest_start=max(
                before + min(len(row), last)
                for before, row in zip(held, rows, strict=True)
            ),
            longest=max(totals),
            max_new=max_new_tokens,
            tile_size=lm.tile_size,
            block_size=lm.sparse.block_size,
        )
        if conversation is not None:
            held_capacity = conversation.state.cache.capacity
            capacity = max(self.shapes.capacity, held_capacity)
            self.shapes = dataclasses.replace(self.shapes, capacity=capacity)
        self.policy: list[str] = []
        self.cache = self._cache_kind(conversation)
        self.settings = dataclasses.replace(
            lm.settings, offload=offload_settings(self.cache, lm.selector)
        )
        self._model_types = signature(lm.model)
        self._programs: dict[Hashable, Callable] = {}
        self._decide_prefetch()
        self.compile_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        refuse_what_cannot_fit(
            self.settings,
            self.cache,
            batch,
            self.shapes,
            dtype=lm.model.embedding[...].dtype,
            storage=lm.model.storage,
            forecast=lm.model.forecast is not None,
            held=None if conversation is None else conversation.state,
        )
        if conversation is None:
            self.state = new_state(
                lm.model, self.settings, batch, self.shapes, self.cache
            )
        else:
            self.state = next_turn(
                conversation.take(), self.shapes, self.settings, self.cache
            )

    def _cache_kind(self, conversation: Conversation | None) -> CacheConfig:
        """The cache's configuration with `kind="auto"` decided."""
        lm, cache = self.lm, self.lm.cache
        if cache.kind != "auto":
            return cache
        if conversation is not None:
            held = isinstance(conversation.state.cache, OffloadCache)
            kind = "offload" if held else "resident"
            self.policy.append(f"{kind}: as the conversation began")
            return dataclasses.replace(cache, kind=kind)
        resident = dataclasses.replace(cache, kind="resident")
        reason = why_not(
            lm.settings,
            resident,
            self.batch,
            self.shapes,
            dtype=lm.model.embedding[...].dtype,
            storage=lm.model.storage,
            forecast=lm.model.forecast is not None,
        )
        if reason is None:
            self.policy.append("resident: it fits, and needs no transfers")
            return resident
        self.policy.append(f"offload: {reason}")
        return dataclasses.replace(cache, kind="offload")

    def _decide_prefetch(self) -> None:
        """Settles `prefetch="auto"`, or leaves it to the first steps (`_probe`)."""
        offload = self.settings.offload
        self._undecided = False
        if self.cache.prefetch != "auto" or offload is None:
            return
        if not offload.lookahead:
            self.policy.append("on demand: this attention makes no forecast")
            return
        known = _PROBES.get(self._probe_key())
        if known is None:
            self._undecided = True
        else:
            self._settle(known)

    def _probe_key(self) -> Hashable:
        return self._model_types, self.settings, self.cache, self.batch, self.shapes

    def _settle(self, probe: Probe) -> None:
        self.policy.append(probe.reason())
        offload = self.settings.offload
        assert offload is not None
        if not probe.look_ahead:
            self.settings = dataclasses.replace(
                self.settings, offload=on_demand(offload)
            )

    def _probe(self, steps: int) -> int:
        """Decodes the first steps on demand and decides; returns the steps left."""
        offload, ahead = self.settings.offload, self.settings
        assert offload is not None
        self.settings = dataclasses.replace(ahead, offload=on_demand(offload))
        warm = min(steps, PROBE_WARM)
        self._decode(warm)
        timed = min(steps - warm, PROBE_TIMED)
        before = (self.decode_seconds, self._fetched(), self._longest())
        self._decode(timed)
        seconds = self.decode_seconds - before[0]
        done = self._longest() - before[2]
        if done < PROBE_TIMED // 2:
            return steps - warm - timed  # too little to judge by: the next call may
        cache = self.state.cache
        assert isinstance(cache, OffloadCache)
        block, _, head_dim = cache.store.block_shape
        block_bytes = cache.store.bytes_per_block
        probe = Probe(
            step_seconds=seconds / done,
            missed_bytes=(self._fetched() - before[1]) * block_bytes / done,
            fetch_rate=fetch_rate(offload.route, block, head_dim, cache.store.dtype),
            hidden=hidden_share(offload.route),
        )
        self.settings = ahead
        _PROBES.put(self._probe_key(), probe)
        self._undecided = False
        self._settle(probe)
        return steps - warm - timed

    def _fetched(self) -> int:
        return int(np.sum(self.state.fetches.fetched.to_numpy()))

    def _longest(self) -> int:
        return int(np.max(np.asarray(self.state.generated)))

    def request(self, steps: int, max_new: Array) -> Request:
        """Sampling and limits of one call."""
        return Request(
            sampling=self.sampling,
            stops=self.stops,
            max_new=max_new,
            steps=jnp.int32(steps),
            rope=self.rope,
            pause=self.pause,
        )

    def _call(
        self, function: Callable, *arguments: Prompt | Request, **static: Hashable
    ) -> float:
        """Runs a part on the state; returns its seconds without compilation."""
        model, settings = self.lm.model, self.settings
        if function is begin and settings.offload is not None:
            # Prefill is the same program whether decode looks ahead or not.
            offload = on_demand(settings.offload)
            settings = dataclasses.replace(settings, offload=offload)
        # In one session the types of all arguments are the same in every call.
        program = self._programs.get((function, settings))
        if program is None:
            program, seconds = PROGRAMS.get(
                function,
                (model, self.state, *arguments),
                {"settings": settings, **static},
                donate=(1,),
            )
            self._programs[function, settings] = program
            self.compile_seconds += seconds
        begun = time.perf_counter()
        self.state = program(model, self.state, *arguments)
        jax.block_until_ready(self.state.done)
        return time.perf_counter() - begun

    def prefill(self, *, on_progress: Callable[[int], None] | None = None) -> None:
        """Runs the prompt (in chunks) and samples the first token of every row."""
        longest = max(len(row) for row in self.rows)
        for first in range(0, longest, self.chunk):
            pieces = [row[first : first + self.chunk] for row in self.rows]
            # A row samples its first token with the last chunk of its prompt.
            last = [len(row) <= first + self.chunk for row in self.rows]
            limit = jnp.where(jnp.asarray(last), self.max_new, 0)
            prompt = pad_rows(pieces, self.shapes.prompt)
            request = self.request(0, limit)
            tile = self.shapes.tile
            self.prefill_seconds += self._call(begin, prompt, request, tile_size=tile)
            if on_progress is not None:
                on_progress(max(len(piece) for piece in pieces))
        if self.stop_strings:
            self._read()

    def decode(self, steps: int) -> None:
        """Decodes up to `steps` more tokens."""
        if self._undecided:
            steps = self._probe(steps)
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
            self.state = self.state._replace(done=jnp.asarray(done))

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
            self.state = decode_host_loop(
                self.lm.model, self.state, request, settings=self.settings
            )
            jax.block_until_ready(self.state.done)
            self.decode_seconds += time.perf_counter() - begun
            return
        self.decode_seconds += self._call(advance, request)

    def whole(self) -> None:
        """Prompt and all tokens in one call."""
        if self._undecided:
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
        prompt = pad_rows(self.rows, self.shapes.prompt)
        request = self.request(int(self.max_new[0]), self.max_new)
        tile = self.shapes.tile
        self.prefill_seconds += self._call(run, prompt, request, tile_size=tile)

    @property
    def finished(self) -> bool:
        """Every row has ended."""
        return bool(np.all(np.asarray(self.state.done)))

    def tokens(self) -> list[list[int]]:
        """Output tokens so far."""
        tokens, counts = np.asarray(self.state.tokens), np.asarray(self.state.generated)
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    def _offload_stats(self) -> OffloadStats | None:
        cache, offload = self.state.cache, self.settings.offload
        if offload is None or not isinstance(cache, OffloadCache):
            return None
        block_bytes = cache.store.bytes_per_block
        return offload_stats(self.state.fetches, offload, block_bytes=block_bytes)

    def output(self, *, split: bool) -> GenerateOutput:
        """The result after the last call."""
        tokens = self.tokens()
        stops = {int(token) for token in np.asarray(self.stops)}
        tokenizer = self.lm.tokenizer
        texts = [] if tokenizer is None else [tokenizer.decode(row) for row in tokens]
        if self.stop_strings:
            texts = [text.text for text in self.texts]
        state = self.state
        blocks = [
            counts.to_ints() for counts in (state.prefill_counts, state.decode_counts)
        ]
        prefill_seconds, decode_seconds = self.prefill_seconds, self.decode_seconds
        stats = GenerateStats(
            prompt_tokens=sum(len(row) for row in self.rows),
            new_tokens=sum(len(row) for row in tokens),
            batch=self.batch,
            prefill_seconds=prefill_seconds if split else None,
            decode_seconds=decode_seconds if split else None,
            total_seconds=prefill_seconds + decode_seconds,
            compile_seconds=self.compile_seconds,
            prefill_blocks=blocks[0],
            decode_blocks=blocks[1],
            offload=self._offload_stats(),
            policy="; ".join(self.policy),
        )
        lengths = tuple(int(length) for length in np.asarray(state.lengths))
        return GenerateOutput(
            tokens=tokens,
            texts=texts,
            finish_reasons=[
                "non_finite"
                if bad
                else "stop"
                if row[-1] in stops or text.matched
                else "length"
                for row, text, bad in zip(
                    tokens, self.texts, np.asarray(state.broken), strict=True
                )
            ],
            stats=stats,
            conversation=Conversation(
                state, lengths, self.rope_length, MadeWith.of(self.lm, self.cache)
            ),
        )
