"""What a layer learns from: its own queries' choice of blocks.

Per head a softmax over key means, summed over the heads of a group, and brought to the
windows that inference selects by. A fine teacher of whole rows can come from the kernel
of own-query block scores instead (`kernel_cells`): then not even a tile's scores of the
heads are written, and tiles are a hundred times as large, which is what a GPU wants.

Source: docs/algorithm.md §5.2, §5.3.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_scores.api import block_scores
from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import compress_keys
from sparda_jax.sparse.selection import (
    constrain_by_importance,
    force_blocks,
    pool_to_blocks,
    top_blocks,
)
from train.config import LossConfig
from train.tiles import KERNEL_POOL, MASKED, Documents, Queries, head_scores, num_blocks

Kernels = tuple[Literal["mosaic_gpu", "triton", "xla"], ...]


class LayerKeys(NamedTuple):
    """What a layer's queries are scored against.

    Attributes:
      grid: Key means on the teacher's grid, J = S (fine) or W (deployed); of the oracle
        the keys themselves.
      windows: Key means that inference selects by, W = M·ρ.
      whole: The window lies in one document.
      importance: NOSA: window means of c, or None.
    """

    grid: Float[Array, "B K J H"]
    windows: Float[Array, "B K W H"]
    whole: Bool[Array, "B W"]
    importance: Float[Array, "B K W"] | None

    def before(self, token: int, loss: LossConfig, sparse: SparseConfig) -> "LayerKeys":
        """What lies before that token, a multiple of the block size."""
        window = token // sparse.kernel_stride
        grid = window if loss.teacher == "deployed" else token
        importance = self.importance
        return LayerKeys(
            self.grid[:, :, :grid],
            self.windows[:, :, :window],
            self.whole[:, :window],
            None if importance is None else importance[:, :, :window],
        )


class Teacher(NamedTuple):
    """What a tile learns from.

    Attributes:
      cells: T′ of docs/algorithm.md §5.2: probability on the windows of inference,
        not normalised; 0 where the document has no such window.
      scores: The same pooled to blocks, forced blocks +∞.
      routing: Blocks to attend to.
      partition: Blocks that the loss resolves; forced ones are still among them.
    """

    cells: Float[Array, "B K T W"]
    scores: Float[Array, "B K T M"]
    routing: Int[Array, "B K T P"]
    partition: Int[Array, "B K T Q"]


def partition_sparse(sparse: SparseConfig, *, key_bias: bool) -> SparseConfig:
    """NOSA's loss knows the query-aware blocks only (docs/algorithm.md §5.3)."""
    if not key_bias:
        return sparse
    quota = sparse.init_blocks + sparse.local_blocks + sparse.query_blocks
    budget = min(max(quota, sparse.forced_blocks), sparse.largest_budget)
    return dataclasses.replace(sparse, block_budget=budget)


def layer_keys(
    k: Float[Array, "B T K H"],
    documents: Documents,
    key_bias: Float[Array, "B T K"] | None,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
) -> LayerKeys:
    """Key means on both grids, padded to whole blocks.

    The fine grid averages neighbours, k̃_j = (k_j + k_{j+1})/2 (docs/algorithm.md §5.2).
    """
    tokens = k.shape[1]
    length = num_blocks(tokens, sparse) * sparse.block_size
    count = length // sparse.kernel_stride

    def padded(x: Array, size: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, size - x.shape[2])
        return jnp.pad(x, widths)

    windows = padded(compress_keys(k, sparse), count)
    if loss.teacher == "fine":
        wide = k.astype(jnp.float32)
        means = ((wide[:, :-1] + wide[:, 1:]) / 2).astype(k.dtype)
        grid = padded(jnp.swapaxes(means, 1, 2), length)
    elif loss.teacher == "oracle":
        grid = padded(jnp.swapaxes(k, 1, 2), length)
    else:
        grid = windows
    first = jnp.arange(count) * sparse.kernel_stride
    own_end = jnp.take(documents.end, jnp.minimum(first, tokens - 1), axis=1)
    whole = first + sparse.kernel_size <= own_end
    importance = None
    if key_bias is not None:
        means = compress_keys(key_bias[..., None], sparse)[..., 0]
        importance = jnp.where(whole[:, None], padded(means, count), -jnp.inf)
    return LayerKeys(grid, windows, whole, importance)


def group_softmax(
    scores: Float[Array, "B K G T J"], seen: Bool[Array, "B T J"]
) -> Float[Array, "B K T J"]:
    """Softmax over keys for each head, summed over the heads of a group.

    A row that sees nothing gets zeros.

    Source: docs/algorithm.md §2.3.
    """
    mask = seen[:, None, None]
    scores = jnp.where(mask, scores, MASKED)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total > 0, total, 1.0), axis=2)


def window_masks(
    queries: Queries, whole: Bool[Array, "B W"], sparse: SparseConfig
) -> tuple[Bool[Array, "B T W"], Bool[Array, "B T W"], Bool[Array, "B T W"]]:
    """Windows of the query's document; those begun by then; those finished by then."""
    first = jnp.arange(whole.shape[1]) * sparse.kernel_stride
    token = queries.token[:, None]
    exists = whole[:, None] & (first >= queries.start[..., None])
    exists &= first < queries.end[..., None]
    return (
        exists,
        exists & (first <= token),
        exists & (first + sparse.kernel_size - 1 <= token),
    )


def confine(
    scores: Float[Array, "B K T M"], queries: Queries, sparse: SparseConfig
) -> Float[Array, "B K T M"]:
    """Init blocks are those of the query's document; no block lies before it."""
    block = jnp.arange(scores.shape[-1])
    first = (queries.start // sparse.block_size)[:, None, :, None]
    own = (queries.token // sparse.block_size)[:, None]
    init = (block >= first) & (block < first + sparse.init_blocks) & (block <= own)
    return jnp.where(block < first, -jnp.inf, jnp.where(init, jnp.inf, scores))


def own_block(queries: Queries, sparse: SparseConfig) -> Int[Array, "B 1 T"]:
    own = queries.token // sparse.block_size
    return jnp.broadcast_to(own, (queries.q.shape[0], 1, own.shape[0]))


def forced(
    scores: Float[Array, "B K T W"], queries: Queries, sparse: SparseConfig
) -> Float[Array, "B K T M"]:
    """Window scores (−∞: no window) → block scores with forced blocks at +∞.

    Source: docs/algorithm.md §2.4.
    """
    blocks = pool_to_blocks(scores, sparse.windows_per_block)
    blocks = force_blocks(blocks, own_block(queries, sparse), sparse)
    return confine(blocks, queries, sparse)


def route(
    scores: Float[Array, "B K T M"],
    queries: Queries,
    keys: LayerKeys,
    sparse: SparseConfig,
) -> Int[Array, "B K T P"]:
    """Block lists for attention; NOSA's second stage follows where it has one.

    Source: docs/algorithm.md §3.
    """
    own = own_block(queries, sparse)
    if keys.importance is not None:
        scores = constrain_by_importance(scores, keys.importance, own, sparse)
        scores = confine(scores, queries, sparse)
    return top_blocks(scores, own, jnp.zeros(own.shape[0], jnp.int32), sparse)


def teacher_cells(
    queries: Queries,
    keys: LayerKeys,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
    token_scores: Float[Array, "B K G T S"] | None = None,
) -> Float[Array, "B K T W"]:
    """The teacher on the windows that inference uses (docs/algorithm.md §5.2).

    The fine grid is brought to them by the maximum, or the mean, over the 17 fine keys
    that start in a window's first half or right before it.

    Args:
      queries: The tile.
      keys: What it is scored against.
      sparse: Block geometry.
      loss: Variant of the loss.
      token_scores: Scores of the plain keys, where attention needs them anyway: the
        score of a mean of two keys is the mean of their scores.
    """
    exists, _, finished = window_masks(queries, keys.whole, sparse)
    if loss.teacher == "deployed":
        return group_softmax(head_scores(queries.q, keys.grid), finished)
    index = jnp.arange(keys.grid.shape[2])
    seen = (index <= queries.token[:, None]) & (index >= queries.start[..., None])
    seen &= index <= queries.end[..., None] - 2
    if token_scores is None:
        scores = head_scores(queries.q, keys.grid)
    else:
        after = jnp.pad(token_scores[..., 1:], [(0, 0)] * 4 + [(0, 1)])
        scores = (token_scores + after) / 2
    fine = group_softmax(scores, seen)
    stride = sparse.kernel_stride
    if loss.align == "max":
        cells = pool_to_blocks(fine, stride)
    else:
        grouped = fine.reshape(*fine.shape[:-1], -1, stride)
        before = jnp.pad(grouped[..., :-1, -1], [(0, 0)] * 3 + [(1, 0)])
        cells = (jnp.sum(grouped, axis=-1) + before) / (stride + 1)
    return jnp.where(exists[:, None], cells, 0.0)


def kernel_cells(
    queries: Queries, keys: LayerKeys, *, sparse: SparseConfig, kernels: Kernels
) -> Float[Array, "B K T W"] | None:
    """`teacher_cells` of the fine grid, by the kernel of own-query block scores.

    That kernel sums softmaxes over a group and takes the maximum over the windows that
    touch a block. Windows of 2 keys every key are the fine grid, and a block of 4 keys
    is touched by its own 4 and the one before: the maximum over a cell's blocks is that
    over its 17 keys. The kernel wants a window to be finished, the teacher that it has
    begun: one position more. No score of a head is written to memory.

    Rows must be whole documents.

    Args:
      queries: The tile.
      keys: What it is scored against.
      sparse: Block geometry.
      kernels: Implementations, the first one that takes the call.

    Returns:
      The cells; None if no kernel takes the call.
    """
    grid, dtype = keys.grid, queries.q.dtype
    batch, _, length, _ = grid.shape
    # The last token of a document starts no fine key.
    held = jnp.minimum(queries.end[:, 0] - 1, length)
    for name in kernels:
        try:
            pooled = block_scores(
                queries.q,
                grid.astype(dtype),
                q_start=jnp.full((batch,), queries.token[0] + 1, jnp.int32),
                num_windows=held.astype(jnp.int32),
                blocks=length // KERNEL_POOL,
                block_size=KERNEL_POOL,
                kernel_size=2,
                kernel_stride=1,
                init_blocks=0,
                local_blocks=0,
                softmax=True,
                implementation=name,
            )
        except NotImplementedError:
            continue
        assert not isinstance(pooled, tuple)
        per_cell = sparse.kernel_stride // KERNEL_POOL
        cells = pooled.reshape(*pooled.shape[:3], -1, per_cell).max(-1)
        exists = window_masks(queries, keys.whole, sparse)[0]
        # Blocks that a query cannot see come as −∞.
        return jnp.where(exists[:, None], jnp.maximum(cells, 0.0), 0.0)
    return None


def oracle_scores(
    queries: Queries, keys: LayerKeys, sparse: SparseConfig
) -> Float[Array, "B K T M"]:
    """Attention mass of blocks, summed over a group's heads; forced blocks at +∞."""
    index = jnp.arange(keys.grid.shape[2])
    seen = (index <= queries.token[:, None]) & (index >= queries.start[..., None])
    mass = group_softmax(head_scores(queries.q, keys.grid), seen)
    mass = jnp.sum(mass.reshape(*mass.shape[:3], -1, sparse.block_size), axis=-1)
    blocks = force_blocks(mass, own_block(queries, sparse), sparse)
    return confine(blocks, queries, sparse)


def teach(
    queries: Queries,
    keys: LayerKeys,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
    token_scores: Float[Array, "B K G T S"] | None = None,
    kernels: Kernels = (),
) -> Teacher:
    """Teacher, and the blocks it chooses, for one tile.

    Source: docs/algorithm.md §5.2, §5.3.
    """
    exists = window_masks(queries, keys.whole, sparse)[0]
    if loss.teacher == "oracle":
        # No loss looks at windows where lists are what counts.
        cells = jnp.zeros((*keys.windows.shape[:2], *exists.shape[1:]), jnp.float32)
        scores = oracle_scores(queries, keys, sparse)
    else:
        cells = kernel_cells(queries, keys, sparse=sparse, kernels=kernels)
        if cells is None:
            cells = teacher_cells(
                queries, keys, sparse=sparse, loss=loss, token_scores=token_scores
            )
        scores = forced(jnp.where(exists[:, None], cells, -jnp.inf), queries, sparse)
    routing = route(scores, queries, keys, sparse)
    partition = routing
    if keys.importance is not None:
        own = own_block(queries, sparse)
        length = jnp.zeros(own.shape[0], jnp.int32)
        pure = partition_sparse(sparse, key_bias=True)
        partition = top_blocks(scores, own, length, pure)
    return Teacher(cells, scores, routing, partition)
