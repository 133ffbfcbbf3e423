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
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig

IndexState = dict[str, Any]


class TokenKV(NamedTuple):
    """A tile's tokens: keys after RoPE, values, NOSA's c or None, and queries."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None
    q: Float[Array, "B T N H"] | None = None


class NewTokens(NamedTuple):
    """A tile's tokens on their way into a layer.

    Attributes:
      tokens: Keys, values and queries.
      layer: Index on the leading axis of what they are put into.
      start: Tokens that each row holds already.
      count: How many of the tile's tokens each row gets.
    """

    tokens: TokenKV
    layer: int | Int[Array, ""]
    start: Int[Array, " B"]
    count: Int[Array, " B"]


class PromptEnd(NamedTuple):
    """A layer's cache when a prefill call has run all of its tiles.

    Attributes:
      kv: The layer's blocks, of one layer or of all.
      key_bias: NOSA's c per token, or None.
      layer: Index on their leading axis.
      start: Tokens that each row held before the call.
      length: Tokens that each row holds now.
      ends: Rows whose prompt ends with this call; the others go on in a further one, or
        had no tokens in it.
    """

    kv: Float[Array, "layers B K M block 2 H"]
    key_bias: Float[Array, "layers B K M block"] | None
    layer: int | Int[Array, ""]
    start: Int[Array, " B"]
    length: Int[Array, " B"]
    ends: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class IndexShape:
    """Sizes of an index.

    Attributes:
      layers, batch, kv_heads, blocks: Leading axes, and blocks of capacity per row.
        Every array of a state leads with layers and rows.
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

    def append(self, state: Any, new: NewTokens, sparse: SparseConfig) -> Any:
        """The state with more tokens in every row of a layer.

        Tokens may come one by one or all at once: the result must be the same.
        """
        raise NotImplementedError

    def end_prefill(
        self,
        state: Any,
        layer: int | Int[Array, ""],
        end: PromptEnd,
        *,
        sparse: SparseConfig,
    ) -> Any:
        """The state once a prefill call has run all of a layer's tiles.

        For what is settled once, by a whole prompt. It may read all keys of the layer;
        queries it must have kept by itself in `append`, so that a prompt may be cut
        into calls. Rows that are not in `end.ends` must stay as they are.
        """
        del layer, end, sparse
        return state


Indices = Mapping[str, IndexPart]


def init_index(indices: Indices, shape: IndexShape, sparse: SparseConfig) -> IndexState:
    """The states of all parts for a cache without tokens."""
    return {name: part.init(shape, sparse) for name, part in indices.items()}


def append_to_index(
    indices: Indices, index: IndexState, new: NewTokens, sparse: SparseConfig
) -> IndexState:
    """The states of all parts with more tokens in every row of a layer."""
    return {
        name: part.append(index[name], new, sparse) for name, part in indices.items()
    }


def end_prefill_of_index(
    indices: Indices,
    index: IndexState,
    layer: int | Int[Array, ""],
    end: PromptEnd,
    sparse: SparseConfig,
) -> IndexState:
    """The states of all parts behind a prefill call's last tile of a layer."""
    return {
        name: part.end_prefill(index[name], layer, end, sparse=sparse)
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
