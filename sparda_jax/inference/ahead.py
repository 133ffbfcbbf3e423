"""A decode step that a caller does not wait for."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.inference.generate import GenerateState, Request, decode_one
from sparda_jax.models.decoder import Decoder


class Seen(NamedTuple):
    """What a caller looks at of a state, in buffers of its own.

    They outlive the next step, which uses up those of the state.

    Attributes:
      tokens, generated, done: As in `GenerateState`.
    """

    tokens: Int[Array, "B room"]
    generated: Int[Array, " B"]
    done: Bool[Array, " B"]


def decode_one_and_show(
    model: Decoder, state: GenerateState, request: Request, *, settings: LayerSettings
) -> tuple[GenerateState, Seen]:
    """Decodes one token, without a loop: the call returns before the device is done.

    A loop asks its condition on the host, so that a call of `decode_loop` may last as
    long as its steps.

    Args:
      model: The decoder.
      state: Where generation stands.
      request: Sampling and limits; its steps and pauses are not looked at.
      settings: The model and how to attend.
    """
    state = decode_one(model, state, request, settings)
    return state, Seen(state.tokens, state.generated, state.done)
