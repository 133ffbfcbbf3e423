"""Least and largest key of every block, channel by channel (Quest's page bounds)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, TokenKV


@dataclasses.dataclass(frozen=True)
class KeyBounds(IndexPart):
    """Bounds [layers, B, K, M, 2, H] of post-RoPE keys: minima, then maxima.

    A block without tokens holds +∞ and −∞; the one that is growing holds the bounds of
    the tokens that it has.
    """

    def init(
        self, shape: IndexShape, sparse: SparseConfig
    ) -> Float[Array, "layers B K M 2 H"]:
        """As `IndexPart.init`."""
        lead = (shape.layers, shape.batch, shape.kv_heads, shape.blocks)
        ends = jnp.array([jnp.inf, -jnp.inf], shape.dtype)[:, None]
        return jnp.broadcast_to(ends, (*lead, 2, shape.head_dim))

    def append(
        self,
        state: Float[Array, "layers B K M 2 H"],
        layer: int | Int[Array, ""],
        new: TokenKV,
        *,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        sparse: SparseConfig,
    ) -> Float[Array, "layers B K M 2 H"]:
        """As `IndexPart.append`."""
        batch, steps, kv_heads, dim = new.k.shape
        size, blocks = sparse.block_size, state.shape[3]
        # The tile's tokens by block: its first one stands somewhere in a block.
        touched = 1 if steps == 1 else -(-(steps + size - 1) // size)
        first = start // size
        if steps == 1:
            k, valid = new.k, (count > 0)[:, None]
            width = 1
        else:
            width = size
            source = jnp.arange(touched * size) - (start % size)[:, None]
            valid = (source >= 0) & (source < count[:, None])
            index = jnp.clip(source, 0, steps - 1)[:, :, None, None]
            k = jnp.take_along_axis(new.k, index, axis=1)
        valid = valid[:, :, None, None]
        shape = (batch, touched, width, kv_heads, dim)
        least = jnp.where(valid, k, jnp.inf).reshape(shape).min(2)
        most = jnp.where(valid, k, -jnp.inf).reshape(shape).max(2)
        block = first[:, None] + jnp.arange(touched)
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
        at = jnp.minimum(block, blocks - 1)[:, None]
        # What a block held before counts only if this row put it there.
        held = (block * size < start[:, None])[:, None, :, None]
        old = state[layer, rows, heads, at]
        least = jnp.swapaxes(least, 1, 2).astype(state.dtype)
        most = jnp.swapaxes(most, 1, 2).astype(state.dtype)
        bounds = jnp.stack(
            (
                jnp.where(held, jnp.minimum(old[..., 0, :], least), least),
                jnp.where(held, jnp.maximum(old[..., 1, :], most), most),
            ),
            axis=-2,
        )
        some = block * size < (start + count)[:, None]
        where = jnp.where(some, block, blocks)[:, None]
        return state.at[layer, rows, heads, where].set(bounds, mode="drop")
