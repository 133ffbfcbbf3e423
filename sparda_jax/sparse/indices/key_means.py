"""Means of post-RoPE keys over overlapping windows (docs/algorithm.md §2.2)."""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import (
    CompressedKeys,
    Int8CompressedKeys,
    empty_int8_windows,
)
from sparda_jax.sparse.index import IndexShape, TokenKV
from sparda_jax.sparse.indices.window_means import WindowMeans


@dataclasses.dataclass(frozen=True)
class KeyMeans(WindowMeans):
    """Window means of the keys, in their type or in 8 bits a number."""

    def init(
        self, shape: IndexShape, sparse: SparseConfig
    ) -> CompressedKeys | Int8CompressedKeys:
        """As `IndexPart.init`."""
        if sparse.compressed_keys == "exact":
            return super().init(shape, sparse)
        lead = (shape.layers, shape.batch, shape.kv_heads)
        windows = shape.blocks * sparse.windows_per_block
        return empty_int8_windows(lead, windows, shape.head_dim)

    def width_and_dtype(self, shape: IndexShape) -> tuple[int, DTypeLike]:
        """As a key."""
        return shape.head_dim, shape.dtype

    def averaged(self, new: TokenKV) -> Float[Array, "B T K H"]:
        """The keys."""
        return new.k
