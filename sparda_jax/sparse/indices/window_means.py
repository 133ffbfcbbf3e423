"""Means over overlapping windows, of whatever a token brings.

Source: docs/algorithm.md §2.2.
"""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import (
    CompressedKeys,
    Int8CompressedKeys,
    append_windows,
    empty_windows,
)
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens, TokenKV

Means = CompressedKeys | Int8CompressedKeys


@dataclasses.dataclass(frozen=True)
class WindowMeans(IndexPart):
    """Window m of a row and head averages tokens σm … σm + κ − 1.

    A subclass says what it averages.
    """

    def width_and_dtype(self, shape: IndexShape) -> tuple[int, DTypeLike]:
        """Numbers that a token brings to a head, and the type of the means."""
        raise NotImplementedError

    def averaged(self, new: TokenKV) -> Float[Array, "B T K width"]:
        """What is averaged of a tile's tokens."""
        raise NotImplementedError

    def init(self, shape: IndexShape, sparse: SparseConfig) -> Means:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        windows = shape.blocks * sparse.windows_per_block
        return empty_windows(lead, windows, *self.width_and_dtype(shape))

    def append(
        self,
        state: Means,
        new: NewTokens,
        sparse: SparseConfig,
    ) -> Means:
        """As `IndexPart.append`."""
        return append_windows(
            state,
            new.layer,
            self.averaged(new.tokens),
            start=new.start,
            count=new.count,
            sparse=sparse,
        )
