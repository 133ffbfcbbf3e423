"""The vocabulary as the devices of a mesh divide it: each knows its own part's logits.

All of it is written for `shard_map`. On one device the part is the whole, and nothing
is exchanged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparda_jax.mesh import MODEL


def first_token(part: int, vocab: int) -> int | Int[Array, ""]:
    """The first token of this device's part.

    Args:
      part: Tokens of a device, W.
      vocab: Tokens in all, V.
    """
    return 0 if part == vocab else jax.lax.axis_index(MODEL) * part


def own_part(x: Shaped[Array, "rows V"], part: int) -> Shaped[Array, "rows W"]:
    """This device's part of what every device has whole.

    Args:
      x: A value a token of the vocabulary.
      part: Tokens of a device, W.
    """
    if part == x.shape[1]:
        return x
    begin = first_token(part, x.shape[1])
    return jax.lax.dynamic_slice_in_dim(x, begin, part, axis=1)


def of_all_devices(
    x: Float[Array, "rows W"], part: int, vocab: int
) -> Float[Array, "rows all"]:
    """What all devices have, side by side, on every one of them.

    Args:
      x: Some values of each device: its part of the logits, or fewer.
      part: Tokens of a device.
      vocab: Tokens in all.
    """
    return x if part == vocab else jax.lax.all_gather(x, MODEL, axis=1, tiled=True)


def most_of_devices(
    x: Float[Array, " rows"], part: int, vocab: int
) -> Float[Array, " rows"]:
    """The largest value of all devices.

    Args:
      x: One of each device; not NaN.
      part: Tokens of a device.
      vocab: Tokens in all.
    """
    return x if part == vocab else jax.lax.pmax(x, MODEL)


def largest(
    x: Float[Array, "rows W"],
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """The largest value of a device's part and its place there, the first of equals."""
    place = jnp.argmax(x, axis=1).astype(jnp.int32)
    return jnp.take_along_axis(x, place[:, None], axis=1)[:, 0], place


def token_of_largest(
    value: Float[Array, " rows"], place: Int[Array, " rows"], part: int, vocab: int
) -> Int[Array, " rows"]:
    """The token of the largest value of all devices, the first of equals.

    Two numbers a row and device are exchanged. NaN is the largest, as for `argmax`.

    Args:
      value, place: Of `largest`, of this device's part.
      part: Tokens of a device.
      vocab: Tokens in all.
    """
    if part == vocab:
        return place
    # A float32 holds every token id below 2²⁴.
    token = (first_token(part, vocab) + place).astype(jnp.float32)
    both = jax.lax.all_gather(jnp.concatenate([value, token]), MODEL)
    values, tokens = jnp.split(both, 2, axis=1)  # [devices, rows] each
    # Devices have the tokens in their order: the first device has the lowest of equals.
    winner = jnp.argmax(values, axis=0)
    return jnp.take_along_axis(tokens, winner[None], axis=0)[0].astype(jnp.int32)
