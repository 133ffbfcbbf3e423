"""Block scores of a prefill tile without its window scores: the fast forms.

`pallas_kernels.block_scores` walks over windows only up to the tile's last position and
holds neither T×W nor logits of a whole row. The readable forms in `selection` say what
comes out; tests hold the two together. Decode, one row of windows, uses those.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_scores.api import block_scores
from pallas_kernels.dispatch import Implementation
from sparda_jax.config import SparseConfig
from sparda_jax.sparse.selection import (
    SelectionTile,
    forecast_scores,
    own_query_scores,
    pool_to_blocks,
)


def _scores(
    query: Float[Array, "B T heads H"],
    tile: SelectionTile,
    sparse: SparseConfig,
    implementation: Implementation | None,
    *,
    softmax: bool,
) -> Float[Array, "B K T M"]:
    windows = tile.windows.shape[2]
    count = None
    if not softmax:
        # Only the raw form shows a query windows that end behind it, so only there
        # unfinished ones must be kept out (docs/algorithm.md §4.3).
        complete = (tile.length - sparse.kernel_size) // sparse.kernel_stride + 1
        count = jnp.clip(complete, 0, windows)
    out = block_scores(
        query,
        tile.windows.astype(query.dtype),
        q_start=tile.positions[:, 0],
        num_windows=count,
        blocks=windows // sparse.windows_per_block,
        block_size=sparse.block_size,
        kernel_size=sparse.kernel_size,
        kernel_stride=sparse.kernel_stride,
        init_blocks=sparse.init_blocks,
        local_blocks=sparse.local_blocks + 1,
        softmax=softmax,
        mask_future_blocks=sparse.mask_future_blocks,
        implementation=implementation,
    )
    assert not isinstance(out, tuple)
    return out


def own_query_block_scores(
    tile: SelectionTile,
    sparse: SparseConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T M"]:
    """`own_query_scores`, pooled and forced (docs/algorithm.md §2.3, §2.4)."""
    assert tile.q is not None
    return _scores(tile.q, tile, sparse, implementation, softmax=True)


def forecast_block_scores(
    tile: SelectionTile,
    sparse: SparseConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T M"]:
    """`forecast_scores`, pooled and forced (docs/algorithm.md §4.3, §2.4).

    A window that starts at or before its query and ends behind it has a score here even
    if future blocks are masked; it belongs to forced blocks alone, so the choice is the
    same.
    """
    assert tile.forecast is not None
    softmax = tile.forecast_is_summed
    return _scores(tile.forecast, tile, sparse, implementation, softmax=softmax)


def score_by_own_query(
    tile: SelectionTile,
    sparse: SparseConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T M"]:
    """Block scores of the layer's own queries, in decode and in prefill."""
    if tile.decoding:
        return pool_to_blocks(own_query_scores(tile, sparse), sparse.windows_per_block)
    return own_query_block_scores(tile, sparse, implementation)


def score_by_forecast(
    tile: SelectionTile,
    sparse: SparseConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T M"]:
    """Block scores of a forecast, in decode and in prefill."""
    if tile.decoding:
        return pool_to_blocks(forecast_scores(tile, sparse), sparse.windows_per_block)
    return forecast_block_scores(tile, sparse, implementation)
