"""Generation: prefill, then a `lax.while_loop` over tokens until every row has ended.

`generate_loop` is both in one program. `prefill_and_sample` and `decode_loop` are its
halves, which plain generation calls one after the other so that both are timed, and
streaming calls as often as it shall yield; a first token then waits for the compilation
of its half alone.
All limits are dynamic and lengths are bucketed: other requests do not recompile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.counters import BlockCounts, FetchTotals
from sparda_jax.cache.evict import kept_blocks
from sparda_jax.cache.offload import init_offload
from sparda_jax.cache.resident import init_cache
from sparda_jax.cache.settings import LayerSettings, OffloadSettings
from sparda_jax.config import CacheConfig, ConfigError, ModelConfig
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.logprobs import TokenLogs, empty_logs, record_logs
from sparda_jax.inference.prefill import prefill
from sparda_jax.inference.sampling import (
    SamplingState,
    cannot_choose,
    sample,
    without_stops,
)
from sparda_jax.inference.shapes import Shapes
from sparda_jax.inference.stack import Cache, StackCarry, block_counts
from sparda_jax.models.decoder import Decoder, own_logits
from sparda_jax.models.rope import Rope

_MAX_STOPS = 16


class GenerateState(NamedTuple):
    """Everything that generation carries from one call to the next.

    Attributes:
      cache: The KV cache.
      lengths: Tokens in the cache, per row [B].
      pending: The last token, sampled but not in the cache yet [B].
      tokens: Output tokens [B, room], −1 where there is none yet.
      generated: Output tokens of each row [B].
      done: Rows that have ended [B].
      broken: Rows that ended because their logits were not finite: no token follows
        from such [B].
      seen: Tokens of prompt and output (repetition penalty) [B, V].
      prefill_counts, decode_counts: Blocks read and present.
      fetches: Counters of an offloaded cache by layer [L]; zeros for a resident one.
      logs: Log-probabilities of the output tokens; None where nobody can ask for them.
    """

    cache: Cache
    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    tokens: Int[Array, "B room"]
    generated: Int[Array, " B"]
    done: Bool[Array, " B"]
    broken: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    prefill_counts: BlockCounts
    decode_counts: BlockCounts
    fetches: FetchTotals
    logs: TokenLogs | None = None


class Prompt(NamedTuple):
    """New tokens of every row.

    Attributes:
      tokens: Right-padded token ids [B, T].
      count: How many of them are valid [B]; a row with 0 keeps what it has.
    """

    tokens: Int[Array, "B T"]
    count: Int[Array, " B"]


class Request(NamedTuple):
    """What a call asks for, all of it dynamic.

    Attributes:
      sampling: Settings per row.
      stops: Token ids that end a row, −1 padded; of each row, or the same for all.
      max_new: Output tokens at which a row ends [B].
      steps: Most tokens that the call decodes after the prefill.
      rope: Rotary frequencies of the request.
      pause: Tokens after which the call ends early, for the caller to look at the
        text; None for none.
      min_new: Output tokens before which no token of `stops` is drawn [B]; None for
        none.
      logged: Whether a row asks for log-probabilities; of use where the state has room
        for them.
    """

    sampling: SamplingState
    stops: Int[Array, "*#B stops"]
    max_new: Int[Array, " B"]
    steps: Int[Array, ""]
    rope: Rope
    pause: Bool[Array, " V"] | None = None
    min_new: Int[Array, " B"] | None = None
    logged: Bool[Array, ""] | None = None


def _emit(
    state: GenerateState,
    scores: Float[Array, "B W"],
    writes: Bool[Array, " B"],
    request: Request,
) -> GenerateState:
    """Samples a token for the rows in `writes` and records it."""
    vocab = state.seen.shape[1]
    unclear = cannot_choose(scores, vocab)
    broken, writes = writes & unclear, writes & ~unclear
    drawn_from = scores
    if request.min_new is not None:
        early = state.generated < request.min_new
        drawn_from = without_stops(scores, request.stops, early, vocab)
    token = sample(drawn_from, state.seen, state.generated, request.sampling)
    rows = jnp.arange(token.shape[0])
    slot = jnp.where(writes, state.generated, state.tokens.shape[1])
    generated = state.generated + writes
    stopped = jnp.any(token[:, None] == request.stops, axis=1)
    ended = writes & (stopped | (generated >= request.max_new))
    column = jnp.where(writes, token, state.seen.shape[1])
    logs = state.logs
    if logs is not None and request.logged is not None:
        logs = record_logs(logs, scores, token, slot, request.logged, vocab)
    return state._replace(
        logs=logs,
        pending=jnp.where(writes, token, state.pending),
        tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
        generated=generated,
        done=state.done | ended | broken,
        broken=state.broken | broken,
        seen=state.seen.at[rows, column].set(True, mode="drop"),
    )


def prefill_and_sample(
    model: Decoder,
    state: GenerateState,
    prompt: Prompt,
    request: Request,
    *,
    settings: LayerSettings,
    tile_size: int,
) -> GenerateState:
    """Prefills the prompt and samples the first token of every row that has one.

    Args:
      model: The decoder.
      state: Where generation stands; `new_state` makes an empty one.
      prompt: New tokens.
      request: Sampling and limits.
      settings: The model and how to attend.
      tile_size: Query tokens per prefill tile.
    """
    return prefill_with_hidden(
        model, state, prompt, request, settings=settings, tile_size=tile_size
    )[0]


def prefill_with_hidden(
    model: Decoder,
    state: GenerateState,
    prompt: Prompt,
    request: Request,
    *,
    settings: LayerSettings,
    tile_size: int,
) -> tuple[GenerateState, Float[Array, "B T D"]]:
    """`prefill_and_sample`, and what the layers made of the prompt's tokens.

    Args:
      model, state, prompt, request, settings, tile_size: As there.
    """
    tokens, count = prompt
    fresh = count > 0
    rows = jnp.arange(count.shape[0])[:, None]
    inside = jnp.arange(tokens.shape[1]) < count[:, None]
    column = jnp.where(inside, tokens, state.seen.shape[1])
    carry = prefill(
        model,
        state.cache,
        tokens,
        state.lengths,
        count,
        request.rope,
        settings,
        tile_size=tile_size,
        # A call that samples nothing is followed by another one of the same prompt.
        ends=fresh & (request.max_new > state.generated),
    )
    counts = block_counts(
        carry, state.lengths, count, tokens.shape[1], settings, decoding=False
    )
    last = jnp.maximum(count - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(carry.hidden, last, axis=1)[:, 0]
    state = state._replace(
        cache=carry.cache,
        lengths=state.lengths + count,
        done=jnp.where(fresh, request.max_new <= state.generated, state.done),
        seen=state.seen.at[rows, column].set(True, mode="drop"),
        prefill_counts=state.prefill_counts.plus(counts),
    )
    state = _emit(state, own_logits(model, hidden), fresh & ~state.done, request)
    return state, carry.hidden


def prefill_and_sample_new(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    *,
    settings: LayerSettings,
    shapes: Shapes,
) -> GenerateState:
    """`prefill_and_sample` on an empty, resident state that the program makes.

    Args:
      model: The decoder.
      prompt: The tokens; its rows are the state's.
      request: Sampling and limits.
      settings: The model and how to attend; not offloaded.
      shapes: Sizes of the state.
    """
    rows = prompt.count.shape[0]
    state = new_state(model, settings, rows, shapes, CacheConfig())
    return prefill_and_sample(
        model, state, prompt, request, settings=settings, tile_size=shapes.tile
    )


def after_step(
    state: GenerateState,
    carry: StackCarry,
    scores: Float[Array, "B W"],
    request: Request,
    settings: LayerSettings,
) -> GenerateState:
    """The state after a decode step: counters, lengths and the sampled tokens.

    Args:
      state: Where generation stood.
      carry: What the layers made of the step.
      scores: Logits of the rows' last token, of this device's part of the vocabulary.
      request: Sampling and limits.
      settings: The model and how to attend.
    """
    active = ~state.done
    fed = active.astype(jnp.int32)
    counts = block_counts(carry, state.lengths, fed, 1, settings, decoding=True)
    state = state._replace(
        cache=carry.cache,
        lengths=state.lengths + fed,
        decode_counts=state.decode_counts.plus(counts),
    )
    if carry.fetches is not None:
        state = state._replace(fetches=state.fetches.add(carry.fetches))
    return _emit(state, scores, active, request)


def must_pause(state: GenerateState, request: Request) -> Bool[Array, ""]:
    """Whether a row that goes on has just got one of the request's pause tokens."""
    if request.pause is None:
        return jnp.bool_(False)
    return jnp.any(request.pause[state.pending] & ~state.done)


def decode_one(
    model: Decoder, state: GenerateState, request: Request, settings: LayerSettings
) -> GenerateState:
    """The state after one more token of every row that has not ended.

    Args:
      model: The decoder.
      state: Where generation stands.
      request: Sampling and limits; its steps and pauses are not looked at.
      settings: The model and how to attend.
    """
    carry = decode_step(
        model,
        state.cache,
        state.pending,
        state.lengths,
        ~state.done,
        request.rope,
        settings,
    )
    scores = own_logits(model, carry.hidden[:, 0])
    return after_step(state, carry, scores, request, settings)


def decode_loop(
    model: Decoder, state: GenerateState, request: Request, *, settings: LayerSettings
) -> GenerateState:
    """Decodes up to `request.steps` tokens, until a pause or until all rows ended."""

    def unfinished(loop: tuple[Array, Array, GenerateState]) -> Array:
        step, paused, state = loop
        return (step < request.steps) & jnp.any(~state.done) & ~paused

    def step(
        loop: tuple[Array, Array, GenerateState],
    ) -> tuple[Array, Array, GenerateState]:
        number, _, state = loop
        state = decode_one(model, state, request, settings)
        return number + 1, must_pause(state, request), state

    begun = (jnp.int32(0), jnp.bool_(False), state)
    return jax.lax.while_loop(unfinished, step, begun)[2]


def generate_loop(
    model: Decoder,
    state: GenerateState,
    prompt: Prompt,
    request: Request,
    *,
    settings: LayerSettings,
    tile_size: int,
) -> GenerateState:
    """Both of the above: a whole generation as one pure function."""
    state = prefill_and_sample(
        model, state, prompt, request, settings=settings, tile_size=tile_size
    )
    return decode_loop(model, state, request, settings=settings)


# The state's buffers are donated: a cache is never copied from one call to the next.
_TILED = ("settings", "tile_size")
prefill_and_sample_call = jax.jit(
    prefill_and_sample, static_argnames=_TILED, donate_argnames="state"
)
decode_loop_call = jax.jit(
    decode_loop, static_argnames="settings", donate_argnames="state"
)
generate_loop_call = jax.jit(
    generate_loop, static_argnames=_TILED, donate_argnames="state"
)


def list_width(shapes: Shapes, settings: LayerSettings) -> int:
    """Blocks that a token of such a state attends to at most."""
    blocks = shapes.capacity // settings.sparse.block_size
    return settings.selector.list_width(blocks, settings.sparse)


def staging_areas(offload: OffloadSettings, cache: CacheConfig) -> int:
    """Staging buffers that a cache keeps.

    Fetches that overlap need areas of their own; what `auto` decides shall not matter.
    """
    ahead = offload.lookahead or cache.prefetch == "auto"
    return offload.route.staging_areas(1 + offload.layers_ahead * ahead)


def new_state(
    model: Decoder,
    settings: LayerSettings,
    batch: int,
    shapes: Shapes,
    cache: CacheConfig,
    *,
    abstract: bool = False,
    top_logprobs: int | None = None,
) -> GenerateState:
    """An empty state for a batch.

    Args:
      model: The decoder, for its type and storage.
      settings: The model's shape, the selection, and how an offloaded cache is decoded.
      batch: B.
      shapes: Bucketed sizes.
      cache: Where the KV lives.
      abstract: For `jax.eval_shape`: do not allocate the host store.
      top_logprobs: Likeliest tokens to keep the log-probabilities of, beside those of
        the output; None keeps none at all.
    """
    kind = {
        "batch": batch,
        "capacity": shapes.capacity,
        "dtype": model.embedding[...].dtype,
        "storage": model.storage,
    }
    offload = settings.offload
    if offload is None:
        kept = kept_blocks(settings, shapes.capacity, shapes.new)
        kv: Cache = init_cache(
            settings.config, settings.sparse, settings.indices, **kind, kept=kept
        )
    else:
        kv = init_offload(
            settings.config,
            settings.sparse,
            cache,
            settings.indices,
            **kind,
            width=list_width(shapes, settings),
            staging=staging_areas(offload, cache),
            codec=offload.codec,
            abstract=abstract,
        )
    zeros = functools.partial(jnp.zeros, (batch,))
    return GenerateState(
        cache=kv,
        lengths=zeros(jnp.int32),
        pending=zeros(jnp.int32),
        tokens=jnp.full((batch, shapes.new), -1, jnp.int32),
        generated=zeros(jnp.int32),
        done=jnp.ones((batch,), bool),
        broken=jnp.zeros((batch,), bool),
        seen=jnp.zeros((batch, settings.config.vocab_size), bool),
        prefill_counts=BlockCounts.zero(),
        decode_counts=BlockCounts.zero(),
        fetches=FetchTotals.zero(settings.config.num_layers),
        logs=(
            None
            if top_logprobs is None
            else empty_logs(batch, shapes.new, top_logprobs)
        ),
    )


def hidden_states(
    model: Decoder,
    prompt: Prompt,
    rope: Rope,
    *,
    settings: LayerSettings,
    shapes: Shapes,
) -> Float[Array, "T D"]:
    """What the layers make of one padded sequence, on a resident cache of its own.

    Args:
      model: Weights.
      prompt: The sequence, padded to `shapes.prompt`.
      rope: Frequencies.
      settings: How layers attend.
      shapes: Sizes.
    """
    state = new_state(model, settings, 1, shapes, CacheConfig())
    carry = prefill(
        model,
        state.cache,
        prompt.tokens,
        jnp.zeros_like(prompt.count),
        prompt.count,
        rope,
        settings,
        tile_size=shapes.tile,
    )
    return carry.hidden[0]


# Counters of a whole call; all else but the cache has the batch as its first axis.
WITHOUT_ROWS = ("prefill_counts", "decode_counts", "fetches")


def pad_rows(rows: list[list[int]], width: int) -> Prompt:
    """Rows as right-padded [B, width] int32 tokens with their counts."""
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    counts = np.array([len(row) for row in rows], np.int32)
    return Prompt(jax.device_put(tokens), jax.device_put(counts))


def stop_array(stops: set[int], config: ModelConfig) -> Int[np.ndarray, " stops"]:
    """EOS and stop ids, −1 padded to a fixed length.

    Raises:
      ConfigError: If an id is out of the vocabulary, or there are too many.
    """
    for token in stops:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"stop_ids holds {token}: it must be in [0, {config.vocab_size})"
            )
    if len(stops) > _MAX_STOPS:
        raise ConfigError(
            f"stop_ids and EOS ids are {len(stops)} in all: at most {_MAX_STOPS}"
        )
    padded = [*sorted(stops), *[-1] * (_MAX_STOPS - len(stops))]
    return np.array(padded, np.int32)
