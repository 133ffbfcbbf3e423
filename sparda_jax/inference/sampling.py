"""Token sampling: penalties, filters and one random stream per sequence.

Every setting is an array over the batch, so that other settings do not recompile. A
token's randomness depends on its sequence's seed and on its place in the sequence
alone: neither on the batch around it nor on how generation is cut into calls.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt

from sparda_jax.checks import Check, ConfigError, integer, number, settle, several
from sparda_jax.models.vocabulary import (
    first_token,
    largest,
    most_of_devices,
    of_all_devices,
    own_part,
    token_of_largest,
)

MOST_SEED = 2**32 - 1

# Below this temperature quotients overflow float32, and the largest logit is all that
# could be drawn anyway.
_COLDEST = 1e-6
# Tokens of each device of a mesh among which rows with a small top-k choose.
_CANDIDATES = 128
# Of every field of `SamplingConfig`; the command line's options use them as well.
SAMPLING_CHECKS: dict[str, Check[Any]] = {
    "repetition_penalty": number(least=1e-6, most=1e6, hint=" (1 is off)"),
    "temperature": number(least=0, most=1e6, hint=" (0 is greedy)"),
    "top_k": integer(0, hint=" (0 is off)"),
    "top_p": number(above=0, most=1, hint=" (1 is off)"),
    "min_p": number(least=0, most=1, hint=" (0 is off)"),
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; the filters apply in the order of the fields.

    Attributes:
      repetition_penalty: Logits of tokens seen in the prompt or the output are divided
        (positive ones) or multiplied (negative ones) by it; 1 is off.
      temperature: Divisor of the logits; 0 is greedy and ignores the filters, and so is
        what is below 1e-6, by which logits would overflow.
      top_k: Keep the k best tokens; 0 is off.
      top_p: Keep the smallest set of best tokens whose probability reaches p; 1 is off.
      min_p: Keep tokens with at least min_p times the best one's probability; 0 is off.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        settle(self, **SAMPLING_CHECKS)


class SamplingState(NamedTuple):
    """`SamplingConfig` and seed of every sequence, as arrays [B]."""

    repetition_penalty: Float[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]


def check_seed(field: str, seed: object) -> int | tuple[int, ...]:
    """Checks one seed or a sequence of them, each in [0, 2³²)."""
    one = integer(0, MOST_SEED)
    if not isinstance(seed, Collection) or getattr(seed, "ndim", 1) == 0:
        return one(field, seed)
    return several(one, "seeds")(field, seed)


def seed_list(
    seed: int | Sequence[int], count: int, each: str = "a sequence"
) -> tuple[int, ...]:
    """One seed for each of `count`, from one for all or one each.

    Raises:
      ConfigError: If a seed is not in [0, 2³²), or their number is another.
    """
    seeds = check_seed("seed", seed)
    if isinstance(seeds, int):
        return (seeds,) * count
    if len(seeds) != count:
        raise ConfigError(
            f"seed has {len(seeds)} values: it must be one integer, or {count} of them "
            f"(one {each})"
        )
    return seeds


def sampling_state(
    config: SamplingConfig,
    seed: int | Sequence[int],
    batch: int,
) -> SamplingState:
    """Arrays for a batch.

    Args:
      config: The same settings for every sequence.
      seed: One seed for all (equal prompts then give equal outputs), or one each.
      batch: B.

    Raises:
      ConfigError: If a seed is not in [0, 2³²), or the number of seeds is not B.
    """
    return sampling_of_rows([config] * batch, seed_list(seed, batch))


def sampling_of_rows(
    configs: Sequence[SamplingConfig], seeds: Sequence[int]
) -> SamplingState:
    """Arrays for rows with settings of their own.

    Args:
      configs: The settings of each row.
      seeds: Their seeds, in [0, 2³²).
    """

    def fill(name: str, kind: DTypeLike) -> Array:
        # Filled on the host: a fill on the device would be one more program a size.
        values = [getattr(config, name) for config in configs]
        return jax.device_put(np.array(values, kind))

    return SamplingState(
        repetition_penalty=fill("repetition_penalty", jnp.float32),
        temperature=fill("temperature", jnp.float32),
        top_k=fill("top_k", jnp.int32),
        top_p=fill("top_p", jnp.float32),
        min_p=fill("min_p", jnp.float32),
        seed=jax.device_put(np.array(seeds, np.uint32)),
    )


def cannot_choose(scores: Float[Array, "B W"], vocab: int) -> Bool[Array, " B"]:
    """Rows whose logits are not finite: nothing can be chosen of them.

    NaN has no largest value, and neither have infinite ones.

    Args:
      scores: Logits of this device's part of the vocabulary.
      vocab: V.
    """
    most = jnp.max(scores, axis=1)
    most = jnp.where(jnp.any(jnp.isnan(scores), axis=1), jnp.inf, most)
    return jnp.isinf(most_of_devices(most, scores.shape[1], vocab))


def without_stops(
    scores: Float[Array, "B W"],
    stops: Int[Array, "*#B stops"],
    early: Bool[Array, " B"],
    vocab: int,
) -> Float[Array, "B W"]:
    """−∞ on the stop tokens of rows that have too few tokens to end.

    Args:
      scores: Logits of this device's part of the vocabulary.
      stops: Token ids, −1 padded; of each row, or the same for all.
      early: Those rows.
      vocab: V.
    """
    rows, part = scores.shape
    own = stops - first_token(part, vocab)
    # Another device's tokens, and padding: below 0 an index would count from the end.
    here = early[:, None] & (stops >= 0) & (own >= 0)
    column = jnp.where(here, own, part)
    return scores.at[jnp.arange(rows)[:, None], column].set(-jnp.inf, mode="drop")


def _penalise(
    logits: Float[Array, "B W"], seen: Bool[Array, "B W"], penalty: Float[Array, " B"]
) -> Float[Array, "B W"]:
    factor = penalty[:, None]
    weaker = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, weaker, logits)


def _ranked(
    logits: Float[Array, "B W"], top_k: Int[Array, " B"], vocab: int
) -> Float[Array, "B V"]:
    """The vocabulary's logits, best first; where all rows' k is small, −∞ behind it.

    A device's best are then all that others need of it.

    Args:
      logits: Of this device's part.
      top_k: Of each row; 0 is off.
      vocab: V.
    """
    part = logits.shape[1]

    def ranked(own: Float[Array, "B n"]) -> Float[Array, "B V"]:
        found = -jnp.sort(-of_all_devices(own, part, vocab), axis=1)
        rest = vocab - found.shape[1]
        return jnp.pad(found, ((0, 0), (0, rest)), constant_values=-jnp.inf)

    if part == vocab or part <= _CANDIDATES:
        return ranked(logits)
    return jax.lax.cond(
        jnp.all((top_k > 0) & (top_k <= _CANDIDATES)),
        lambda: ranked(jax.lax.top_k(logits, _CANDIDATES)[0]),
        lambda: ranked(logits),
    )


def _filter(
    logits: Float[Array, "B W"], state: SamplingState, vocab: int
) -> Float[Array, "B W"]:
    """−∞ on the tokens that top-k, top-p or min-p exclude."""
    # Rows that filter nothing, or are greedy, can do with the best token alone.
    needless = (state.temperature < _COLDEST) | ~_filters(state)
    ranked = _ranked(logits, jnp.where(needless, 1, state.top_k), vocab)
    limit = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab)
    rank = jnp.arange(vocab)
    ranked = jnp.where(rank < limit[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    # A token stays if the better ones have not reached p yet: the best always does.
    better = jnp.cumsum(probability, axis=-1) - probability
    # p = 1 is off: rounded sums may reach it early, or never.
    stays = (better < state.top_p[:, None]) | (state.top_p >= 1)[:, None]
    stays &= probability >= state.min_p[:, None] * probability[:, :1]
    stays &= rank < limit[:, None]
    stays |= rank == 0
    threshold = jnp.min(jnp.where(stays, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _filters(state: SamplingState) -> Bool[Array, " B"]:
    """Rows that exclude tokens."""
    return (state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0)


def sample(
    logits: Float[Array, "B W"],
    seen: Bool[Array, "B V"],
    position: Int[Array, " B"],
    state: SamplingState,
) -> Int[Array, " B"]:
    """Draws one token for every row.

    On a mesh a device has the logits of its part of the vocabulary. They stay there,
    but where a row filters without a small top-k: top-p and min-p are of sums over the
    whole vocabulary, which must be added in one order to give one device's tokens.

    Args:
      logits: Next-token logits, float32, of this device's part (W = V on one device).
      seen: Tokens of the prompt and the output so far.
      position: Index of the new token in its row's output: the random stream's place.
      state: Settings.
    """
    part, vocab = logits.shape[1], seen.shape[1]
    logits = _penalise(logits, own_part(seen, part), state.repetition_penalty)
    hot = state.temperature >= _COLDEST
    greedy = largest(logits)

    def draw() -> tuple[Array, Array]:
        heat = jnp.where(hot, state.temperature, 1.0)
        scaled = logits / heat[:, None]
        kept = jax.lax.cond(
            jnp.any(hot & _filters(state)),
            lambda: _filter(scaled, state, vocab),
            lambda: scaled,
        )

        def noise(seed: Array, place: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), place)
            return jax.random.gumbel(key, (vocab,), kept.dtype)

        # Every device draws the whole vocabulary's: what is one device's needs no word.
        every = jax.vmap(noise)(state.seed, position)
        return largest(own_part(every, part) + kept)

    # Sorting a vocabulary is not free, so a greedy batch skips all of it.
    drawn = jax.lax.cond(jnp.any(hot), draw, lambda: greedy)
    value, place = (jnp.where(hot, *pair) for pair in zip(drawn, greedy, strict=True))
    return token_of_largest(value, place, part, vocab)
