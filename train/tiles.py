"""Tiles of query tokens: what the loss of a layer is streamed over.

A tile scores its queries against all keys that any of them can see, [B, N, tile, S];
nothing larger is ever held, and the tile shrinks as S grows. Causality is used in a few
segments: the queries of the first quarter of a row meet the keys of the first quarter
only.

Several documents may share a row. Each starts at a block boundary; windows, blocks and
attention then stay inside a document exactly as if it stood alone (`Documents`).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig

# Finite, so that a row that sees nothing gives 0 and not NaN.
MASKED = -1e30
# Four segments spend 5/8 of the full square where 1/2 is the least. Each one is
# compiled for itself, which short rows are not worth.
SEGMENTS = 4
_SEGMENT_TOKENS = 1024
# Bytes of one float32 score array of a tile. A CPU wants it in its cache.
_SCORE_BYTES = {"cpu": 6 << 20}
_GPU_SCORE_BYTES = 256 << 20
_SMALLEST_TILE, _LARGEST_TILE = 16, 512
# A kernel pools the fine grid to so many keys, the geometry that it is tuned for, and
# writes one score for each, which bounds the tile in the place of [N, tile, S].
KERNEL_POOL = 4
_LARGEST_KERNEL_TILE = 4096


class Documents(NamedTuple):
    """Which document each token of a row belongs to.

    Attributes:
      start: Index in the row of the document's first token, a multiple of the block
        size.
      end: Index one past its last token. Tokens at or after it are padding: they belong
        to no document and weigh nothing.
    """

    start: Int[Array, "*A B T"]
    end: Int[Array, "*A B T"]

    @staticmethod
    def whole_rows(batch: int, tokens: int) -> "Documents":
        """Every row is one document."""
        start = jnp.zeros((batch, tokens), jnp.int32)
        return Documents(start, jnp.full((batch, tokens), tokens, jnp.int32))

    def positions(self) -> Int[Array, "B T"]:
        """Position of every token in its own document."""
        return jnp.arange(self.start.shape[1]) - self.start


class Queries(NamedTuple):
    """A tile of consecutive query tokens.

    Attributes:
      q: Queries after RoPE.
      forecast: Forecasts for this layer, float32.
      token: Indices in the row.
      start, end: Those of `Documents`.
    """

    q: Float[Array, "B T N H"]
    forecast: Float[Array, "B T KR H"]
    token: Int[Array, " T"]
    start: Int[Array, "B T"]
    end: Int[Array, "B T"]


def num_blocks(tokens: int, sparse: SparseConfig) -> int:
    """Blocks that a row of that many tokens fills."""
    return -(-tokens // sparse.block_size)


def tile_size(batch: int, tokens: int, heads: int, platform: str) -> int:
    """Query tokens per tile, so that one score array stays within bounds."""
    room = _SCORE_BYTES.get(platform, _GPU_SCORE_BYTES)
    fits = room // (4 * batch * heads * tokens)
    size = _SMALLEST_TILE
    while size < _LARGEST_TILE and 2 * size <= fits:
        size *= 2
    return min(size, -(-tokens // _SMALLEST_TILE) * _SMALLEST_TILE)


def tile_bytes() -> int:
    """Bytes of one score array of a tile on the default device."""
    return _SCORE_BYTES.get(jax.default_backend(), _GPU_SCORE_BYTES)


def kernel_tile_size(batch: int, tokens: int, kv_heads: int) -> int:
    """The same where a kernel makes the teacher."""
    fits = _GPU_SCORE_BYTES * KERNEL_POOL // (4 * batch * kv_heads * tokens)
    size = _SMALLEST_TILE
    while size < _LARGEST_KERNEL_TILE and 2 * size <= min(fits, tokens):
        size *= 2
    return size


def tile_queries(
    q: Float[Array, "B T N H"],
    forecast: Float[Array, "B T KR H"],
    documents: Documents,
    size: int,
) -> tuple[int, Callable[[Int[Array, ""]], Queries]]:
    """Number of tiles, and a function that cuts one out of the row.

    The last tile may be filled up with tokens that belong to no document.
    """
    tokens = q.shape[1]
    tiles = -(-tokens // size)
    widths = ((0, 0), (0, tiles * size - tokens))
    row = (
        jnp.pad(q, (*widths, (0, 0), (0, 0))),
        jnp.pad(forecast.astype(jnp.float32), (*widths, (0, 0), (0, 0))),
        jnp.pad(documents.start, widths),
        jnp.pad(documents.end, widths),
    )

    def cut(index: Int[Array, ""]) -> Queries:
        first = index * size
        q, forecast, start, end = (
            jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in row
        )
        return Queries(q, forecast, first + jnp.arange(size), start, end)

    return tiles, cut


def stream_tiles[Out](
    one_tile: Callable[[Int[Array, ""], int], Out],
    *,
    tokens: int,
    size: int,
    sparse: SparseConfig,
    segments: int = SEGMENTS,
) -> Out:
    """Runs tiles of queries one after the other and stacks what they return.

    Causality is used in segments: `one_tile(index, reach)` may look at the tokens
    before `reach` only, a multiple of the block size that grows from segment to
    segment. At most `segments` are made.
    """
    tiles, blocks = -(-tokens // size), num_blocks(tokens, sparse)
    # The literal reference scores blocks after the query's own, which a segment's keys
    # do not reach.
    most = segments if sparse.mask_future_blocks else 1
    segments = max(1, min(most, tiles, tokens // _SEGMENT_TOKENS))
    parts = []
    edges = [tiles * part // segments for part in range(segments + 1)]
    for begin, end in itertools.pairwise(edges):
        # One block more: the aligned teacher of a block's last token reaches into it.
        reach = min(num_blocks(end * size, sparse) + 1, blocks) * sparse.block_size

        def run(index: Int[Array, ""], reach: int = reach) -> Out:
            return one_tile(index, reach)

        parts.append(jax.lax.map(run, jnp.arange(begin, end)))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def join_tiles(x: Array, axis: int, tokens: int) -> Array:
    """[tiles, …, size, …] → the row at that axis, without its padding."""
    x = jnp.moveaxis(x, 0, axis)
    shape = (*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x.reshape(shape), 0, tokens, axis=axis)


def padded_heads(
    x: Float[Array, "B T K *rest"], sparse: SparseConfig
) -> Float[Array, "B K S *rest"]:
    """[B, T, K, …] → [B, K, S, …], S filling whole blocks."""
    size = num_blocks(x.shape[1], sparse) * sparse.block_size
    widths = [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.swapaxes(jnp.pad(x, widths), 1, 2)


def head_scores(
    q: Float[Array, "B T N H"], keys: Float[Array, "B K J H"]
) -> Float[Array, "B K G T J"]:
    """Scaled scores of every query head against the keys of its group, float32."""
    batch, tokens, heads, dim = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "btkgh,bkjh->bkgtj",
        q,
        keys.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return scores * dim**-0.5


def listed_blocks(lists: Int[Array, "B K T P"], blocks: int) -> Bool[Array, "B K T M"]:
    """Block lists as masks."""
    lead = jnp.ogrid[tuple(slice(size) for size in lists.shape[:3])]
    rows = tuple(index[..., None] for index in lead)
    index = jnp.where(lists < 0, blocks, lists)
    chosen = jnp.zeros((*lists.shape[:3], blocks), bool)
    return chosen.at[(*rows, index)].set(True, mode="drop")


def attend_listed(
    scores: Float[Array, "B K G T S"],
    v: Float[Array, "B K S H"],
    lists: Int[Array, "B K T P"],
    queries: Queries,
    sparse: SparseConfig,
) -> Float[Array, "B T N H"]:
    """Attention of a tile over its block lists, by masking the scores of all keys."""
    batch, tokens, heads, dim = queries.q.shape
    size = scores.shape[-1]
    listed = listed_blocks(lists, num_blocks(size, sparse))
    seen = jnp.repeat(listed, sparse.block_size, axis=-1)[..., :size]
    seen &= jnp.arange(size) <= queries.token[:, None]
    # Padding rows list nothing; a finite floor keeps them finite.
    scores = jnp.where(seen[:, :, None], scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)[..., None]
    out = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = jnp.moveaxis(out / total, 3, 1).astype(v.dtype)
    return out.reshape(batch, tokens, heads, dim)
