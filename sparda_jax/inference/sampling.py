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

MOST_SEED = 2**32 - 1

# Below this temperature quotients overflow float32, and the largest logit is all that
# could be drawn anyway.
_COLDEST = 1e-6
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


def _penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    factor = penalty[:, None]
    weaker = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, weaker, logits)


def _filter(logits: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """−∞ on the tokens that top-k, top-p or min-p exclude."""
    vocab = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
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


def sample(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    position: Int[Array, " B"],
    state: SamplingState,
) -> Int[Array, " B"]:
    """Draws one token for every row.

    Args:
      logits: Next-token logits, float32.
      seen: Tokens of the prompt and the output so far.
      position: Index of the new token in its row's output: the random stream's place.
      state: Settings.
    """
    logits = _penalise(logits, seen, state.repetition_penalty)
    hot = state.temperature >= _COLDEST
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        heat = jnp.where(hot, state.temperature, 1.0)
        scaled = logits / heat[:, None]
        active = (state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0)
        kept = jax.lax.cond(
            jnp.any(active), lambda: _filter(scaled, state), lambda: scaled
        )

        def one(seed: Array, place: Array, row: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), place)
            return jax.random.categorical(key, row)

        return jax.vmap(one)(state.seed, position, kept).astype(jnp.int32)

    # Sorting a vocabulary is not free, so a greedy batch skips all of it.
    drawn = jax.lax.cond(jnp.any(hot), draw, lambda: greedy)
    return jnp.where(hot, drawn, greedy)
