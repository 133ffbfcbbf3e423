"""Means of post-RoPE keys over overlapping windows (specification §2.2)."""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparda_jax.sparse.index import IndexShape, TokenKV
from sparda_jax.sparse.indices.window_means import WindowMeans


@dataclasses.dataclass(frozen=True)
class KeyMeans(WindowMeans):
    """Window means of the keys."""

    def width_and_dtype(self, shape: IndexShape) -> tuple[int, DTypeLike]:
        """As a key."""
        return shape.head_dim, shape.dtype

    def averaged(self, new: TokenKV) -> Float[Array, "B T K H"]:
        """The keys."""
        return new.k
