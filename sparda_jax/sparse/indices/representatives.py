"""InfLLM's representatives: a block's mean of the keys that its neighbours looked at.

While a block is local to the queries behind it, their attention votes for its tokens.
When it leaves the last local window, the keys of the tokens with most votes are
averaged, and their mean stands for the block from then on.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens
from sparda_jax.sparse.masked import masked_softmax

# Queries whose votes are counted at a time.
_QUERIES = 128


class RepresentativeState(NamedTuple):
    """What is kept of a layer.

    Attributes:
      recent: The keys of the last tokens [layers, B, K, R, H]; that of position p lies
        at p mod R, and R is a token's local window.
      votes: Their votes so far [layers, B, K, R], float32.
      means: Representatives [layers, B, K, M, H] of the blocks that have left it.
    """

    recent: Float[Array, "layers B K R H"]
    votes: Float[Array, "layers B K R"]
    means: Float[Array, "layers B K M H"]


@dataclasses.dataclass(frozen=True)
class Representatives(IndexPart):
    """Votes are softmax weights over a token's own and local blocks (the forced ones).

    Attributes:
      tokens: Keys that a representative is the mean of.
    """

    tokens: int

    def init(self, shape: IndexShape, sparse: SparseConfig) -> RepresentativeState:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads)
        room = (sparse.local_blocks + 1) * sparse.block_size
        return RepresentativeState(
            recent=jnp.zeros((*lead, room, shape.head_dim), shape.dtype),
            votes=jnp.zeros((*lead, room), jnp.float32),
            means=jnp.zeros((*lead, shape.blocks, shape.head_dim), shape.dtype),
        )

    def append(
        self, state: RepresentativeState, new: NewTokens, sparse: SparseConfig
    ) -> RepresentativeState:
        """As `IndexPart.append`."""
        tokens, layer, start, count = new
        assert tokens.q is not None
        size, local = sparse.block_size, sparse.local_blocks
        batch, steps, kv_heads, _ = tokens.k.shape
        end = start + count
        # From the first block that any of the new queries may look at.
        first_block = start // size - local
        touched = local + -(-(steps + size - 1) // size)
        position = (first_block * size)[:, None] + jnp.arange(touched * size)
        keys, votes = _gather(state, new, position, end)
        votes = votes + _new_votes(tokens.q, keys, position, start, end, size, local)

        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
        means = _means(keys, votes, touched, self.tokens)
        block = first_block[:, None] + jnp.arange(touched)
        left = (block >= 0) & (block < (end // size - local)[:, None])
        where = jnp.where(left, block, state.means.shape[3])[:, None]
        means = means.astype(state.means.dtype)

        room = state.recent.shape[3]
        last = (position < end[:, None]) & (position >= (end - room)[:, None])
        last = last & (position >= 0) & (count > 0)[:, None]
        slot = jnp.where(last, position % room, room)[:, None]
        return RepresentativeState(
            recent=state.recent.at[layer, rows, heads, slot].set(keys, mode="drop"),
            votes=state.votes.at[layer, rows, heads, slot].set(votes, mode="drop"),
            means=state.means.at[layer, rows, heads, where].set(means, mode="drop"),
        )


def _gather(
    state: RepresentativeState,
    new: NewTokens,
    position: Int[Array, "B S"],
    end: Int[Array, " B"],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S"]]:
    """Keys at the positions, old or new, and their votes so far."""
    tokens, layer, start, _ = new
    room, steps = state.recent.shape[3], tokens.k.shape[1]
    at = (position % room)[:, None]
    keys = jnp.take_along_axis(state.recent[layer], at[..., None], axis=2)
    votes = jnp.take_along_axis(state.votes[layer], at, axis=2)
    old = position < start[:, None]
    step = jnp.clip(position - start[:, None], 0, steps - 1)[:, :, None, None]
    fresh = jnp.swapaxes(jnp.take_along_axis(tokens.k, step, axis=1), 1, 2)
    keys = jnp.where(old[:, None, :, None], keys, fresh.astype(keys.dtype))
    held = (position >= 0) & (position < end[:, None])
    keys = jnp.where(held[:, None, :, None], keys, 0)
    return keys, jnp.where((old & held)[:, None], votes, 0.0)


def _new_votes(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    position: Int[Array, "B S"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    size: int,
    local: int,
) -> Float[Array, "B K S"]:
    """What the new queries give to each key, summed over queries and group.

    A few queries at a time: a tile may be large, and each sees its local window alone.
    """
    batch, steps, heads, dim = q.shape
    kv_heads, chunk = keys.shape[1], min(steps, _QUERIES)
    wide = keys.astype(jnp.float32)
    q = jnp.pad(q, ((0, 0), (0, -steps % chunk), (0, 0), (0, 0)))

    def add(number: Int[Array, ""], votes: Array) -> Array:
        first = number * chunk
        asked = jax.lax.dynamic_slice_in_dim(q, first, chunk, axis=1)
        asked = asked.astype(jnp.float32).reshape(
            batch, chunk, kv_heads, heads // kv_heads, dim
        )
        logits = jnp.einsum("btkgh,bksh->bkgts", asked, wide) * dim**-0.5
        token = start[:, None] + first + jnp.arange(chunk)
        least = jnp.maximum((token // size - local) * size, 0)
        seen = (position[:, None] >= least[..., None]) & (
            position[:, None] <= token[..., None]
        )
        seen = seen & (token < end[:, None])[..., None]  # B T S
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        return votes + jnp.sum(masked_softmax(logits), axis=(2, 3))

    none = jnp.zeros(keys.shape[:3], jnp.float32)
    return jax.lax.fori_loop(0, q.shape[1] // chunk, add, none)


def _means(
    keys: Float[Array, "B K S H"],
    votes: Float[Array, "B K S"],
    blocks: int,
    tokens: int,
) -> Float[Array, "B K blocks H"]:
    """Mean key of the tokens with most votes in each block."""
    votes = votes.reshape(*votes.shape[:2], blocks, -1)
    keys = keys.reshape(*votes.shape, keys.shape[-1])
    _, best = jax.lax.top_k(votes, min(tokens, votes.shape[-1]))
    chosen = jnp.take_along_axis(keys, best[..., None], axis=3)
    return jnp.mean(chosen.astype(jnp.float32), axis=3)
