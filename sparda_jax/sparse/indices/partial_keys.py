"""InfiniGen's partial keys: some channels of every key, in a basis made for the prompt.

At a prompt's end an orthogonal basis is taken in which the prompt's last queries lie
along few axes (the eigenvectors of their second moment: what the published skewing gets
of a singular value decomposition), and of its axes those on which the queries are
largest, for every row and kv head by itself. Keys are kept on these axes alone; decode
adds those of new tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens, PromptEnd
from sparda_jax.sparse.indices.query_window import (
    append_queries,
    empty_window,
    window_positions,
)


class PartialState(NamedTuple):
    """What is kept of a layer.

    Attributes:
      queries: The last queries [layers, B, w, N, H].
      axes: The chosen axes of each row and kv head [layers, B, K, H, R], float32.
      keys: Keys on these axes [layers, B, K, S, R].
    """

    queries: Float[Array, "layers B w N H"]
    axes: Float[Array, "layers B K H R"]
    keys: Float[Array, "layers B K S R"]


def choose_axes(
    q: Float[Array, "B w N H"], kv_heads: int, seen: Float[Array, "B w"], count: int
) -> Float[Array, "B K H R"]:
    """The axes to keep of each row and kv head.

    Args:
      q: Queries.
      kv_heads: K.
      seen: 1 for the queries that there are, 0 for the others.
      count: R.
    """
    batch, steps, heads, dim = q.shape
    q = q.astype(jnp.float32) * seen[..., None, None]
    q = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    mean = jnp.mean(q, axis=3)
    _, basis = jnp.linalg.eigh(jnp.einsum("bwkh,bwki->bkhi", mean, mean))
    weight = jnp.abs(jnp.einsum("bwkgh,bkhr->bkwgr", q, basis)).sum((2, 3))
    _, best = jax.lax.top_k(weight, count)
    return jnp.take_along_axis(basis, best[:, :, None], axis=-1)


@dataclasses.dataclass(frozen=True)
class PartialKeys(IndexPart):
    """Keys on the axes that matter to a prompt's last queries.

    Attributes:
      heads: N.
      window: Queries that the axes are chosen by, at most.
      axes: R, axes that are kept.
    """

    heads: int
    window: int
    axes: int

    def init(self, shape: IndexShape, sparse: SparseConfig) -> PartialState:
        """As `IndexPart.init`."""
        lead, dim = (shape.layers, shape.batch, shape.kv_heads), shape.head_dim
        return PartialState(
            queries=empty_window(
                shape.layers, shape.batch, self.window, self.heads, dim, shape.dtype
            ),
            axes=jnp.zeros((*lead, dim, self.axes), jnp.float32),
            keys=jnp.zeros(
                (*lead, shape.blocks * sparse.block_size, self.axes), shape.dtype
            ),
        )

    def append(
        self, state: PartialState, new: NewTokens, sparse: SparseConfig
    ) -> PartialState:
        """As `IndexPart.append`; before the first prompt's end keys have no axes."""
        tokens, layer, start, count = new
        batch, steps, kv_heads, _ = tokens.k.shape
        queries = append_queries(state.queries, new)
        partial = jnp.einsum(
            "btkh,bkhr->btkr", tokens.k.astype(jnp.float32), state.axes[layer]
        )
        step, rows = jnp.arange(steps), jnp.arange(batch)[:, None, None]
        position = jnp.where(
            step < count[:, None], start[:, None] + step, state.keys.shape[3]
        )
        at = (layer, rows, jnp.arange(kv_heads), position[:, :, None])
        keys = state.keys.at[at].set(partial.astype(state.keys.dtype), mode="drop")
        return PartialState(queries, state.axes, keys)

    def end_prefill(
        self,
        state: PartialState,
        layer: int | Int[Array, ""],
        end: PromptEnd,
        *,
        sparse: SparseConfig,
    ) -> PartialState:
        """As `IndexPart.end_prefill`: chooses the axes, and puts all keys on them."""
        _, seen = window_positions(self.window, end.length)
        kv_heads = end.kv.shape[2]
        axes = choose_axes(
            state.queries[layer], kv_heads, seen.astype(jnp.float32), self.axes
        )
        k = end.kv[end.layer, :, :, :, :, 0]  # B K M block H
        keys = jnp.einsum("bkmsh,bkhr->bkmsr", k.astype(jnp.float32), axes)
        keys = keys.reshape(state.keys.shape[1:]).astype(state.keys.dtype)
        ends = end.ends[:, None, None, None]
        return state._replace(
            axes=state.axes.at[layer].set(jnp.where(ends, axes, state.axes[layer])),
            keys=state.keys.at[layer].set(jnp.where(ends, keys, state.keys[layer])),
        )
