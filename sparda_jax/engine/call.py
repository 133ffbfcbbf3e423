"""One call of `generate` or `stream`: all rows of a session join at once."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.checks import instance, optional
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine.batch import Batch
from sparda_jax.engine.compile_cache import signature
from sparda_jax.engine.conversation import Conversation, MadeWith
from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.offload_stats import OffloadStats, offload_stats
from sparda_jax.engine.placement import Placement, Sizes, place, state_layout
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
from sparda_jax.engine.row_request import RowRequest
from sparda_jax.engine.turns import next_state
from sparda_jax.inference.generate import (
    GenerateState,
    generate_loop,
    pad_rows,
)
from sparda_jax.models.rope import model_rope
from sparda_jax.planning.auto import Probe, fetch_rate, hidden_share, on_demand


class Call:
    """One generate or stream call: checked arguments, a session, figures.

    Attributes:
      session: Its rows are the call's, then padding.
      rows: Token ids of each sequence's prompt.
      batch: How many sequences there are.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Prompts,
        config: GenerateConfig,
        conversation: Conversation | None = None,
        *,
        single_call: bool = False,
    ):
        lm = LANGUAGE_MODEL("lm", lm)
        conversation = optional(instance(Conversation))("conversation", conversation)
        prompts, seeds = repeat_prompts(prompts, config.seed, config.n)
        self.lm, self.max_new_tokens = lm, config.max_new_tokens
        self.batch = len(prompts)
        rows = [
            encode_prompt(lm, prompt, f"prompts[{index}]", begins=conversation is None)
            for index, prompt in enumerate(prompts)
        ]
        self.held = (0,) * self.batch
        if conversation is not None:
            conversation.check(lm, self.batch)
            self.held = conversation.lengths
            # The last token of the turn before was sampled but never fed.
            pending = np.asarray(conversation.state.pending)
            rows = [[int(pending[i]), *row] for i, row in enumerate(rows)]
        self.rows = rows
        self.rope_length = self._rope_length(config, conversation)
        asked = [RowRequest.of(lm, config, seed) for seed in seeds]
        self.notes = without_effect(lm, config.max_context, config.prefill_chunk)
        self.chunk = prefill_piece(lm, max(map(len, rows)), config.prefill_chunk)
        placement = self._place(conversation, single_call=single_call)
        state: GenerateState | None = None
        if conversation is not None:
            state = next_state(
                conversation.take(),
                placement.shapes,
                placement.settings,
                placement.cache,
                state_layout(lm, placement, None),
            )
        rope = model_rope(lm.config, self.rope_length)
        self.session = Batch(lm, placement, rope, state)
        for row, request in enumerate(asked):
            self.session.ask(row, request)
        self.prefill_seconds = self.decode_seconds = 0.0
        self._trial: PrefetchTrial | None = None
        self._begin_trial()

    def _rope_length(
        self, config: GenerateConfig, conversation: Conversation | None
    ) -> int:
        """The length to choose rotary frequencies for; checks that all tokens fit."""
        lm, new = self.lm, config.max_new_tokens
        pairs = zip(self.held, self.rows, strict=True)
        totals = [held + len(row) for held, row in pairs]
        for index, total in enumerate(totals):
            check_length(lm, total, new, f"prompts[{index}]")
        length = max(totals) + new
        if config.max_context is not None:
            length = check_max_context(lm, config.max_context, length)
        if conversation is None:
            return length
        original = lm.config.rope.original_max
        crosses = (
            lm.config.rope.kind == "longrope"
            and original is not None
            and conversation.rope_length <= original < length
        )
        if crosses:
            raise ConfigError(
                f"this turn reaches {length} tokens, and the conversation was begun "
                f"with LongRoPE's short factors (up to {original}): begin it with "
                "max_context set to its final length"
            )
        return max(length, conversation.rope_length)

    def _place(
        self, conversation: Conversation | None, *, single_call: bool
    ) -> Placement:
        """Settles where and in which sizes the call runs."""
        longest = max(map(len, self.rows))
        last = (longest - 1) // self.chunk * self.chunk
        pairs = list(zip(self.held, self.rows, strict=True))
        sizes = Sizes(
            batch=self.batch,
            chunk=self.chunk,
            farthest_start=max(held + min(len(row), last) for held, row in pairs),
            longest=max(held + len(row) for held, row in pairs),
            max_new=self.max_new_tokens,
        )
        # One program runs all rows together.
        by_row = False if single_call or self.batch == 1 else None
        placement = place(self.lm, sizes, conversation, by_row=by_row)
        self.notes += placement.notes
        return placement

    def _begin_trial(self) -> None:
        """Where `prefetch="auto"` is to be decided: takes what is known, or begins."""
        session = self.session
        offload = session.settings.offload
        if session.cache.prefetch != "auto" or offload is None:
            return
        if not offload.lookahead:
            self.notes.append("on demand: this attention makes no forecast")
            return
        # Until it is decided decode runs on demand.
        self._ahead = session.settings
        session.settings = dataclasses.replace(self._ahead, offload=on_demand(offload))
        known = PROBES.get(self._probe_key())
        if known is None:
            self._trial = PrefetchTrial()
        else:
            self._settle(known)

    def _probe_key(self) -> Hashable:
        types, session = signature(self.lm.model), self.session
        return types, self._ahead, session.cache, session.rows, session.shapes

    def _settle(self, probe: Probe) -> None:
        self._trial = None
        self.notes.append(probe.reason())
        if probe.look_ahead:
            self.session.settings = self._ahead

    def _decode_trial(self, trial: PrefetchTrial, steps: int) -> int:
        """One call of the first steps, measured; returns the steps left."""
        taken = trial.most(steps)
        fetched, longest = self._fetched(), self._longest()
        seconds = self.session.decode(taken)
        self.decode_seconds += seconds
        trial.add(self._longest() - longest, seconds, self._fetched() - fetched)
        if not trial.complete:
            return steps - taken
        cache, offload = self.session.state.cache, self.session.settings.offload
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
        return int(np.sum(self.session.state.fetches.fetched.to_numpy()))

    def _longest(self) -> int:
        return int(np.max(np.asarray(self.session.state.generated)))

    def prefill(self, *, on_progress: Callable[[int], None] | None = None) -> None:
        """Runs the prompt (in chunks) and samples the first token of every row.

        All rows in one call, or one row after another where a row alone is enough for
        the device (`Shapes.by_row`).
        """
        session, longest = self.session, max(len(row) for row in self.rows)
        for first in range(0, longest, self.chunk):
            pieces = [row[first : first + self.chunk] for row in self.rows]
            # A row samples its first token with the last chunk of its prompt.
            ends = [len(row) <= first + self.chunk for row in self.rows]
            if session.shapes.by_row:
                for row, piece in enumerate(pieces):
                    if piece:
                        seconds = session.prefill_row(row, piece, last=ends[row])
                        self.prefill_seconds += seconds
            else:
                self.prefill_seconds += session.prefill_together(
                    pieces, ends=ends, whole=longest <= self.chunk
                )
            if on_progress is not None:
                on_progress(max(len(piece) for piece in pieces))
        session.end_matched_rows()

    def decode(self, steps: int) -> None:
        """Decodes up to `steps` more tokens."""
        while self._trial is not None and steps > 0 and not self.finished:
            steps = self._decode_trial(self._trial, steps)
        if steps > 0:
            self.decode_seconds += self.session.decode(steps)

    def take_events(self) -> Iterator[StreamEvent]:
        """As `Session.take_events`."""
        return self.session.take_events()

    def whole(self) -> None:
        """Prompt and all tokens in one call."""
        session = self.session
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
        offload = session.settings.offload
        if offload is not None and not offload.route.in_program:
            raise ConfigError(
                "single_call=True is not allowed with "
                f"CacheConfig.route={offload.route.name!r}: that route is a call a "
                "layer"
            )
        if session.has_stop_strings:
            raise ConfigError(
                "single_call=True is not allowed with stop: the text is looked at "
                "between calls"
            )
        rows = [*self.rows, *[[]] * (session.rows - self.batch)]
        prompt = pad_rows(rows, session.shapes.prompt)
        request = session.request(self.max_new_tokens)
        self.prefill_seconds += session.run(
            generate_loop, prompt, request, tile_size=session.shapes.tile
        )

    @property
    def finished(self) -> bool:
        """Every row has ended."""
        return self.session.finished

    def _asked_cache(self) -> CacheConfig:
        """The cache's configuration, with nothing decided but its kind."""
        return dataclasses.replace(self.lm.cache, kind=self.session.cache.kind)

    def _offload_stats(self) -> OffloadStats | None:
        state, offload = self.session.state, self.session.settings.offload
        if offload is None or not isinstance(state.cache, OffloadCache):
            return None
        block_bytes = state.cache.store.bytes_per_block
        return offload_stats(state.fetches, offload, block_bytes=block_bytes)

    def stats(self, *, split: bool) -> GenerateStats:
        """Figures of what has run so far."""
        state = self.session.state
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
            compile_seconds=self.session.compile_seconds,
            prefill_blocks=blocks[0],
            decode_blocks=blocks[1],
            offload=self._offload_stats(),
            policy="; ".join(notes),
        )

    def output(self, *, split: bool) -> GenerateOutput:
        """The result after the last call; of a row that has not ended, what it has."""
        rows = self.session.outputs()[: self.batch]
        texts = [] if self.lm.tokenizer is None else [row.text for row in rows]
        state = self.session.state
        return GenerateOutput(
            tokens=[row.tokens for row in rows],
            texts=texts,
            finish_reasons=[row.finish_reason for row in rows],
            stats=self.stats(split=split),
            conversation=Conversation(
                state,
                tuple(np.asarray(state.lengths)[: self.batch].tolist()),
                self.rope_length,
                MadeWith.of(self.lm, self._asked_cache()),
                layout=self.session.layout,
            ),
        )
