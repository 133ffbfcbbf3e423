"""Which blocks a tile of tokens reads together, and which token reads which."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels._common.numerics import cdiv
from pallas_kernels.block_sparse_attention.operands import Prefill
from pallas_kernels.block_sparse_attention.xla import block_sparse_attention_xla

# One bit a token in an int32 word, the sign bit left alone.
MAX_TOKENS = 31
# Words of all blocks exist for one slab of tiles at a time.
SLAB_WORDS = 8 * 2**20
# With fewer blocks a number and a word of 16 bits share an int32.
MOST_PACKED = 2**15


class Unions(NamedTuple):
    """The lists of a tile's tokens as one list with a mask.

    Attributes:
      blocks: the union in ascending order; entries at and after ``count`` mean
        nothing.
      words: for each of ``blocks``, bit t is set when token t of the tile lists it.
      count: length of the union.
    """

    blocks: Int[Array, "B K tiles U"]
    words: Int[Array, "B K tiles U"]
    count: Int[Array, "B K tiles"]


def tile_unions(
    block_indices: Int[Array, "B K T P"],
    q_start: Int[Array, " B"],
    *,
    blocks: int,
    block: int,
    tokens: int,
) -> Unions:
    """Forms the union of the lists of every ``tokens`` consecutive tokens.

    A block that starts after a token is left out of the token's list: it holds no key
    that the token may read.

    Args:
      block_indices: lists, -1 for padding, no block twice in one list.
      q_start: position of token 0 of each row.
      blocks: number of blocks (M).
      block: tokens of a block.
      tokens: tokens of a tile, at most 31.

    Returns:
      The unions; U is the most blocks that a tile can list.

    Raises:
      ValueError: when ``tokens`` does not fit in a word.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens is {tokens}; allowed: 1 .. {MAX_TOKENS}")
    batch, kv_heads, length, listed = block_indices.shape
    tiles = cdiv(length, tokens)
    most = min(blocks, tokens * listed)
    position = q_start[:, None] + jnp.arange(length)
    start = block_indices * block
    readable = (block_indices >= 0) & (start <= position[:, None, :, None])
    index = jnp.where(readable, block_indices, blocks)
    # Slabs of tiles bound the memory of the words of all blocks.
    per_slab = max(1, min(tiles, SLAB_WORDS // (batch * kv_heads * blocks)))
    slabs = cdiv(tiles, per_slab)
    padding = slabs * per_slab * tokens - length
    index = jnp.pad(
        index, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=blocks
    )
    index = index.reshape(batch, kv_heads, slabs, per_slab, tokens, listed)
    row = jnp.arange(batch)[:, None, None, None, None]
    head = jnp.arange(kv_heads)[:, None, None, None]
    tile = jnp.arange(per_slab)[:, None, None]
    bit = (1 << jnp.arange(tokens, dtype=jnp.int32))[:, None]

    def slab(index):
        words = jnp.zeros((batch, kv_heads, per_slab, blocks), jnp.int32)
        # No block is twice in one list, so that adding bits is or-ing them.
        words = words.at[row, head, tile, index].add(bit, mode="drop")
        listed_somewhere = words != 0
        place = jnp.cumsum(listed_somewhere, -1, dtype=jnp.int32) - 1
        # One index for each place: the compiler would write out four of them.
        lead = batch * kv_heads * per_slab
        place = place.reshape(lead, blocks) + most * jnp.arange(lead)[:, None]
        place = jnp.where(listed_somewhere.reshape(lead, blocks), place, lead * most)

        def packed(x):
            """Values of all blocks, those of listed ones moved to the front."""
            out = jnp.zeros((lead * most,), jnp.int32)
            out = out.at[place].set(x, mode="drop", unique_indices=True)
            return out.reshape(batch, kv_heads, per_slab, most)

        number = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), place.shape)
        flat = words.reshape(lead, blocks)
        if tokens <= 16 and blocks <= MOST_PACKED:
            both = packed((number << 16) | flat)
            found = both >> 16, both & 0xFFFF
        else:
            found = packed(number), packed(flat)
        return (*found, listed_somewhere.sum(-1, dtype=jnp.int32))

    if slabs == 1:
        return Unions(*(x[:, :, :tiles] for x in slab(index[:, :, 0])))
    out = lax.map(slab, jnp.moveaxis(index, 2, 0))
    merged = []
    for x in out:
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(batch, kv_heads, slabs * per_slab, *x.shape[4:])
        merged.append(x[:, :, :tiles])
    return Unions(*merged)


def unions_of(operands: Prefill, tokens: int) -> Unions:
    """``tile_unions`` of a call that has lists."""
    assert operands.block_indices is not None
    return tile_unions(
        operands.block_indices,
        operands.q_start,
        blocks=operands.blocks,
        block=operands.block,
        tokens=tokens,
    )


def where_finite[Result](
    kernel: Callable[[Prefill], Result], operands: Prefill
) -> Result:
    """Runs a kernel that shares a value tile among tokens, or else the XLA form.

    In a tile, a token's weight for a key that it does not list is 0, and 0 times a
    non-finite value is NaN. Such kernels therefore run only where no value of the layer
    is NaN or infinite, which reads the values once: small against a prefill.
    """
    finite = jnp.isfinite(operands.kv[operands.layer, ..., 1, :]).all()
    return lax.cond(finite, kernel, block_sparse_attention_xla, operands)
