"""The last queries of every row, kept for what a prompt's end settles.

A ring: the query at position p lies at p mod w. So a prompt may be cut into calls, and
its last window is there whole when it ends.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.sparse.index import NewTokens

Window = Float[Array, "layers B w N H"]


def empty_window(
    layers: int, batch: int, size: int, heads: int, head_dim: int, dtype: DTypeLike
) -> Window:
    """A ring without queries."""
    return jnp.zeros((layers, batch, size, heads, head_dim), dtype)


def append_queries(window: Window, new: NewTokens) -> Window:
    """The ring with the new tokens' queries."""
    q, start = new.tokens.q, new.start
    assert q is not None
    size = window.shape[2]
    position = start[:, None] + jnp.arange(q.shape[1])
    end = (start + new.count)[:, None]
    kept = (position < end) & (position >= end - size)
    at = (
        new.layer,
        jnp.arange(q.shape[0])[:, None],
        jnp.where(kept, position % size, size),
    )
    return window.at[at].set(q.astype(window.dtype), mode="drop")


def window_positions(
    size: int, length: Int[Array, " B"]
) -> tuple[Int[Array, "B w"], Bool[Array, "B w"]]:
    """Positions of a ring's queries, and which of them there are.

    Args:
      size: w.
      length: Tokens that each row holds.
    """
    last = (length - 1)[:, None]
    position = last - (last - jnp.arange(size)) % size
    return position, position >= 0
