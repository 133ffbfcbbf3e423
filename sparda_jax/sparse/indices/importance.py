"""NOSA's importance of keys: its bias c, averaged over the windows of the key means."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import (
    CompressedKeys,
    append_windows,
    empty_windows,
)
from sparda_jax.sparse.index import IndexPart, IndexShape, TokenKV


@dataclasses.dataclass(frozen=True)
class Importance(IndexPart):
    """Window means of c, the same for every query (specification §3)."""

    def init(self, shape: IndexShape, sparse: SparseConfig) -> CompressedKeys:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        windows = shape.blocks * sparse.windows_per_block
        return empty_windows(lead, windows, 1, jnp.float32)

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
        assert new.key_bias is not None
        bias = new.key_bias[..., None]
        return append_windows(
            state, layer, bias, start=start, count=count, sparse=sparse
        )
