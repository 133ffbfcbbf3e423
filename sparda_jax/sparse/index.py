"""What a selector knows of a layer's keys: its index, kept beside the KV blocks.

An index is made of parts, each with a name and an `IndexPart` that knows how to begin
and extend it. The cache holds their states and knows nothing else of them. A state is a
tree of arrays whose leading axes are layers and rows; all but the sizes that follow
from the number of blocks is fixed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig

IndexState = dict[str, Any]


class TokenKV(NamedTuple):
    """A tile's tokens: keys after RoPE, values, NOSA's c or None, and queries."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None
    q: Float[Array, "B T N H"] | None = None


@dataclasses.dataclass(frozen=True)
class IndexShape:
    """Sizes of an index.

    Attributes:
      layers, batch, kv_heads, blocks: Leading axes, and blocks of capacity per row.
      head_dim: H.
      dtype: Type of the keys.
    """

    layers: int
    batch: int
    kv_heads: int
    blocks: int
    head_dim: int
    dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class IndexPart:
    """One part of an index. A frozen value without state."""

    def init(self, shape: IndexShape, sparse: SparseConfig) -> Any:
        """The state of a cache without tokens."""
        raise NotImplementedError

    def append(
        self,
        state: Any,
        layer: int | Int[Array, ""],
        new: TokenKV,
        *,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        sparse: SparseConfig,
    ) -> Any:
        """The state with `count` tokens more in every row of a layer.

        Tokens may come one by one or all at once: the result must be the same.
        """
        raise NotImplementedError


Indices = Mapping[str, IndexPart]


def init_index(indices: Indices, shape: IndexShape, sparse: SparseConfig) -> IndexState:
    """The states of all parts for a cache without tokens."""
    return {name: part.init(shape, sparse) for name, part in indices.items()}


def append_to_index(
    indices: Indices,
    index: IndexState,
    layer: int | Int[Array, ""],
    new: TokenKV,
    *,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    sparse: SparseConfig,
) -> IndexState:
    """The states of all parts with `count` tokens more in every row of a layer."""
    return {
        name: part.append(
            index[name], layer, new, start=start, count=count, sparse=sparse
        )
        for name, part in indices.items()
    }


def grow_index(
    indices: Indices, index: IndexState, shape: IndexShape, sparse: SparseConfig
) -> IndexState:
    """The states with room for more blocks; what they hold stays in front."""
    empty = init_index(indices, shape, sparse)
    return jax.tree.map(
        lambda new, old: lax.dynamic_update_slice(new, old, (0,) * new.ndim),
        empty,
        index,
    )
