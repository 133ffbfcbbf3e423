"""Scores of given tokens: surprises of a text, and a model's view of another's answer.

Logits are made for a slice of the tokens at a time: those of a whole long text, times
the vocabulary, would not fit.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine.api import generate
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.on_mesh import on_devices
from sparda_jax.engine.placement import Placement, state_layout
from sparda_jax.engine.turns import next_state
from sparda_jax.engine.whole_sequence import run_whole
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.generate import (
    GenerateState,
    Prompt,
    hidden_states,
)
from sparda_jax.inference.shapes import Shapes, plan_shapes
from sparda_jax.models.decoder import Decoder, logits
from sparda_jax.models.rope import Rope, model_rope

_SLICE = 512
# Dense's likeliest tokens that the divergence tells apart; the rest is one.
LIKELIEST = 64


class TokenScores(NamedTuple):
    """What a model says of the tokens of a text, from the second on.

    Attributes:
      surprises: −log p, float32 [T − 1].
      likeliest: Whether the token is the one with the highest logit [T − 1].
    """

    surprises: np.ndarray
    likeliest: np.ndarray


def _score_text(
    model: Decoder,
    prompt: Prompt,
    rope: Rope,
    *,
    settings: LayerSettings,
    shapes: Shapes,
) -> tuple[Float[Array, " T"], Bool[Array, " T"]]:
    """Surprise of the token behind each one; the last one's is of no use."""
    hidden = hidden_states(model, prompt, rope, settings=settings, shapes=shapes)
    following = jnp.roll(prompt.tokens[0], -1)
    width = following.shape[0]
    hidden = jnp.pad(
        hidden[:width], ((0, max(0, -(-width // _SLICE) * _SLICE - width)), (0, 0))
    )
    following = jnp.pad(following, (0, hidden.shape[0] - width))

    def score(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, tokens = pair
        scores = logits(model, rows)
        own = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
        best = jnp.argmax(scores, axis=-1) == tokens
        return jax.nn.logsumexp(scores, axis=-1) - own, best

    surprises, best = jax.lax.map(
        score,
        (hidden.reshape(-1, _SLICE, hidden.shape[1]), following.reshape(-1, _SLICE)),
    )
    return surprises.reshape(-1)[:width], best.reshape(-1)[:width]


def score_tokens(lm: LanguageModel, ids: list[int]) -> TokenScores:
    """Scores every token of a text but the first, as prefill attends.

    Args:
      lm: A loaded model.
      ids: Token ids, at least two.

    Raises:
      ConfigError: If there are fewer, or more than the context holds.
    """
    if len(ids) < 2:
        raise ConfigError(f"ids has {len(ids)} tokens: it must hold at least 2")
    surprises, best = run_whole(_score_text, lm, ids)
    count = len(ids) - 1
    return TokenScores(np.asarray(surprises)[:count], np.asarray(best)[:count])


class Views(NamedTuple):
    """What a model, decoding, says before each of some forced tokens.

    Attributes:
      likeliest: Its first choice, int32 [T].
      tokens: Those that it was asked about [T, LIKELIEST].
      logs: Their log-probabilities, float32 [T, LIKELIEST].
    """

    likeliest: np.ndarray
    tokens: np.ndarray
    logs: np.ndarray


class _Forced(NamedTuple):
    tokens: Int[Array, " T"]
    about: Int[Array, "T likeliest"]


def _decode_forced(
    model: Decoder,
    state: GenerateState,
    forced: _Forced,
    rope: Rope,
    *,
    settings: LayerSettings,
    own: bool,
) -> tuple[Int[Array, " T"], Int[Array, "T likeliest"], Float[Array, "T likeliest"]]:
    """Feeds the tokens one by one; `own` asks about the model's own likeliest ones."""

    def step(
        carry: tuple, token_and_about: tuple[Array, Array]
    ) -> tuple[tuple, tuple[Array, Array, Array]]:
        cache, lengths = carry
        token, about = token_and_about
        done = decode_step(
            model,
            cache,
            token[None],
            lengths,
            jnp.ones((1,), bool),
            rope,
            settings,
        )
        logs = jax.nn.log_softmax(logits(model, done.hidden[:, 0])[0])
        asked = jax.lax.top_k(logs, LIKELIEST)[1] if own else about
        first = jnp.argmax(logs).astype(jnp.int32)
        return (done.cache, lengths + 1), (first, asked.astype(jnp.int32), logs[asked])

    begun = (state.cache, state.lengths)
    _, views = jax.lax.scan(step, begun, (forced.tokens, forced.about))
    return views


def view_of_answer(
    lm: LanguageModel,
    prompt: list[int],
    answer: list[int],
    about: np.ndarray | None,
) -> Views:
    """What a model says before each token of an answer, as decode attends.

    The prompt is prefilled and the answer fed token by token, so that selectors that
    change at the end of prefill are seen as they decode.

    Args:
      lm: A loaded model with a resident cache.
      prompt: Token ids.
      answer: Tokens that follow it: before each but the first a view is taken.
      about: Which tokens to give the log-probabilities of, [len(answer) − 1,
        LIKELIEST]; None takes the model's own likeliest ones.
    """
    lm = dataclasses.replace(lm, cache=CacheConfig())
    out = generate(lm, [prompt], max_new_tokens=1, ignore_eos=True)
    total = len(prompt) + len(answer)
    shapes = plan_shapes(
        1,
        farthest_start=total,
        longest=total,
        max_new=1,
        tile_size=1,
        block_size=lm.sparse.block_size,
    )
    placement = Placement(1, shapes, lm.cache, lm.settings, ())
    on_mesh = state_layout(lm, placement, None)
    state = out.conversation.take()
    state = next_state(state, shapes, lm.settings, lm.cache, on_mesh)
    own = about is None
    steps = len(answer) - 1
    asked = np.zeros((steps, LIKELIEST), np.int32) if about is None else about
    forced = _Forced(jnp.asarray(answer[:-1], jnp.int32), jnp.asarray(asked, jnp.int32))
    arguments = (lm.model, state, forced, model_rope(lm.config, total))
    static = {"settings": lm.settings, "own": own}
    function = on_devices(lm, _decode_forced, on_mesh)
    program, _ = PROGRAMS.get(function, arguments, static)
    first, tokens, logs = program(*arguments)
    return Views(np.asarray(first), np.asarray(tokens), np.asarray(logs))


def divergence(
    reference: Float[np.ndarray, "T likeliest"], other: Float[np.ndarray, "T likeliest"]
) -> Float[np.ndarray, " T"]:
    """KL(reference ‖ other) at each token, all other tokens taken as one.

    What is taken together cannot be told apart: the value is at most the divergence
    over the whole vocabulary.

    Args:
      reference: Log-probabilities of its likeliest tokens.
      other: Those of the same tokens.
    """
    first, second = reference.astype(np.float64), other.astype(np.float64)
    rests = [np.clip(1 - np.exp(x).sum(axis=1), 1e-12, None) for x in (first, second)]
    told = (np.exp(first) * (first - second)).sum(axis=1)
    return np.maximum(told + rests[0] * np.log(rests[0] / rests[1]), 0.0)
