"""Means of post-RoPE keys over overlapping windows (specification §2.2)."""

import dataclasses

from jaxtyping import Array, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import (
    CompressedKeys,
    append_windows,
    empty_windows,
)
from sparda_jax.sparse.index import IndexPart, IndexShape, TokenKV


@dataclasses.dataclass(frozen=True)
class KeyMeans(IndexPart):
    """Window m of a row and head averages keys σm … σm + κ − 1."""

    def init(self, shape: IndexShape, sparse: SparseConfig) -> CompressedKeys:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        windows = shape.blocks * sparse.windows_per_block
        return empty_windows(lead, windows, shape.head_dim, shape.dtype)

    def append(
        self,
        state: CompressedKeys,
        layer: int | Int[Array, ""],
        new: TokenKV,
        *,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        sparse: SparseConfig,
    ) -> CompressedKeys:
        """As `IndexPart.append`."""
        return append_windows(
            state, layer, new.k, start=start, count=count, sparse=sparse
        )
