"""Log-probabilities of tokens: of output tokens as they are drawn, and of a prompt's.

They are those of the model's own distribution: before temperature, penalties and
filters, as other servers report them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.models.decoder import Decoder, logits
from sparda_jax.models.vocabulary import of_all_devices

# Positions of a prompt whose logits are held at a time.
_SLICE = 128


class TokenLogs(NamedTuple):
    """Log-probabilities of some tokens.

    Attributes:
      own: Of each token, float32.
      top: The likeliest tokens in its place, best first.
      top_logs: Their log-probabilities.
    """

    own: Float[Array, "*tokens"]
    top: Int[Array, "*tokens top"]
    top_logs: Float[Array, "*tokens top"]


def empty_logs(batch: int, room: int, top: int) -> TokenLogs:
    """Room for the logs of `room` output tokens of every row.

    Args:
      batch: B.
      room: Output tokens of a row.
      top: Likeliest tokens to keep.
    """
    return TokenLogs(
        own=jnp.zeros((batch, room), jnp.float32),
        top=jnp.zeros((batch, room, top), jnp.int32),
        top_logs=jnp.zeros((batch, room, top), jnp.float32),
    )


def score_tokens(
    scores: Float[Array, "rows V"], tokens: Int[Array, " rows"], top: int
) -> TokenLogs:
    """The logs of a token a row.

    Args:
      scores: Logits.
      tokens: The tokens.
      top: Likeliest tokens to keep.
    """
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=-1)
    best, found = jax.lax.top_k(scores, min(top, scores.shape[-1]))
    short = top - found.shape[-1]
    return TokenLogs(
        own=(own - total)[:, 0],
        top=jnp.pad(found, ((0, 0), (0, short)), constant_values=-1),
        top_logs=jnp.pad(best - total, ((0, 0), (0, short)), constant_values=-jnp.inf),
    )


def record_logs(
    logs: TokenLogs,
    scores: Float[Array, "B W"],
    tokens: Int[Array, " B"],
    slot: Int[Array, " B"],
    logged: Bool[Array, ""],
    vocab: int,
) -> TokenLogs:
    """The logs with those of a drawn token a row.

    Args:
      logs: What is known.
      scores: The rows' logits, of this device's part of the vocabulary.
      tokens: What was drawn.
      slot: Its place in each row's output; a place beyond the room is left out.
      logged: Without it nothing is done: a search of the vocabulary is not free, nor
        is an exchange of its logits.
      vocab: V.
    """
    rows = jnp.arange(tokens.shape[0])

    def put(logs: TokenLogs) -> TokenLogs:
        every = of_all_devices(scores, scores.shape[1], vocab)
        new = score_tokens(every, tokens, logs.top.shape[-1])
        return jax.tree.map(
            lambda old, x: old.at[rows, slot].set(x, mode="drop"), logs, new
        )

    return jax.lax.cond(logged, put, lambda logs: logs, logs)


def prompt_logs(
    model: Decoder,
    hidden: Float[Array, "T D"],
    following: Int[Array, " T"],
    top: int,
) -> TokenLogs:
    """The logs of the token behind each position of a prompt.

    Args:
      model: The decoder.
      hidden: What the layers make of the prompt.
      following: The token behind each of its own.
      top: Likeliest tokens to keep.
    """
    width = following.shape[0]
    pad = -width % _SLICE
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    following = jnp.pad(following, (0, pad))

    def score(pair: tuple[Array, Array]) -> TokenLogs:
        rows, tokens = pair
        return score_tokens(logits(model, rows), tokens, top)

    found = jax.lax.map(
        score,
        (hidden.reshape(-1, _SLICE, hidden.shape[1]), following.reshape(-1, _SLICE)),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:width], found)
