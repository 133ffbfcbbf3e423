"""Least and largest key of every page, channel by channel (Quest's page bounds)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.checks import require
from sparda_jax.config import SparseConfig
from sparda_jax.sparse.index import IndexPart, IndexShape, NewTokens


def page_tokens(page: int | None, sparse: SparseConfig) -> int:
    """Tokens of a page: a block's where no page is named or the block is smaller.

    Raises:
      ConfigError: If a block is no whole number of pages.
    """
    size = min(page or sparse.block_size, sparse.block_size)
    allowed = f"a divisor of {sparse.block_size}"
    require(sparse.block_size % size == 0, "page", page, allowed)
    return size


def pages_per_block(page: int | None, sparse: SparseConfig) -> int:
    """Pages of a block."""
    return sparse.block_size // page_tokens(page, sparse)


Bounds = Float[Array, "layers B K pages 2 H"]


@dataclasses.dataclass(frozen=True)
class KeyBounds(IndexPart):
    """Bounds [layers, B, K, pages, 2, H] of post-RoPE keys: minima, then maxima.

    A page without tokens holds +∞ and −∞; the one that is growing holds the bounds of
    the tokens that it has.

    Attributes:
      page: Tokens of a page at most, a divisor of a block's; None is a block.
    """

    page: int | None = None

    def init(self, shape: IndexShape, sparse: SparseConfig) -> Bounds:
        """As `IndexPart.init`."""
        pages = shape.blocks * pages_per_block(self.page, sparse)
        lead = (shape.layers, shape.batch, shape.kv_heads, pages)
        ends = jnp.array([jnp.inf, -jnp.inf], shape.dtype)[:, None]
        return jnp.broadcast_to(ends, (*lead, 2, shape.head_dim))

    def append(self, state: Bounds, new: NewTokens, sparse: SparseConfig) -> Bounds:
        """As `IndexPart.append`."""
        tokens, layer, start, count = new
        batch, steps, kv_heads, dim = tokens.k.shape
        size, pages = page_tokens(self.page, sparse), state.shape[3]
        # The tile's tokens by page: its first one stands somewhere in a page.
        touched = 1 if steps == 1 else -(-(steps + size - 1) // size)
        first = start // size
        if steps == 1:
            k, valid = tokens.k, (count > 0)[:, None]
            width = 1
        else:
            width = size
            source = jnp.arange(touched * size) - (start % size)[:, None]
            valid = (source >= 0) & (source < count[:, None])
            index = jnp.clip(source, 0, steps - 1)[:, :, None, None]
            k = jnp.take_along_axis(tokens.k, index, axis=1)
        valid = valid[:, :, None, None]
        shape = (batch, touched, width, kv_heads, dim)
        least = jnp.where(valid, k, jnp.inf).reshape(shape).min(2)
        most = jnp.where(valid, k, -jnp.inf).reshape(shape).max(2)
        page = first[:, None] + jnp.arange(touched)
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
        at = jnp.minimum(page, pages - 1)[:, None]
        # What a page held before counts only if this row put it there.
        held = (page * size < start[:, None])[:, None, :, None]
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
        some = page * size < (start + count)[:, None]
        where = jnp.where(some, page, pages)[:, None]
        return state.at[layer, rows, heads, where].set(bounds, mode="drop")
