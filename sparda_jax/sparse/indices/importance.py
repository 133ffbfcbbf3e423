"""NOSA's importance of keys: its bias c, averaged over the windows of the key means."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparda_jax.sparse.index import IndexShape, TokenKV
from sparda_jax.sparse.indices.window_means import WindowMeans


@dataclasses.dataclass(frozen=True)
class Importance(WindowMeans):
    """Window means of c, the same for every query (docs/algorithm.md §3)."""

    def width_and_dtype(self, shape: IndexShape) -> tuple[int, DTypeLike]:
        """One number in float32."""
        del shape
        return 1, jnp.float32

    def averaged(self, new: TokenKV) -> Float[Array, "B T K 1"]:
        """The key bias."""
        assert new.key_bias is not None
        return new.key_bias[..., None]
