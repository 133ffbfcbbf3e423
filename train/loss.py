"""The distillation loss of one layer, streamed over tiles of query tokens.

The teacher is the layer's own query: per head a softmax over key means, summed over the
heads of a group. The student is the forecast of the layer before, scored on the key
means that inference uses. The loss is the forward KL of the two over the windows of the
blocks that the teacher chose, all other windows being one more bin (specification §5).

What the teacher chose is also where the layer attends, so one pass over the tiles makes
the loss, its gradient with respect to the forecast, and the block lists. A tile scores
its queries against all keys that any of them can see, [B, N, tile, S]; nothing larger
is ever held, and the tile shrinks as S grows. Causality is used in a few segments: the
queries of the first quarter of a row meet the keys of the first quarter only.

Several documents may share a row. Each starts at a block boundary; windows, blocks and
attention then stay inside a document exactly as if it stood alone (`Documents`).

A fine teacher of whole rows can come from the kernel of own-query block scores instead
(`kernel_cells`): then not even a tile's scores of the heads are written, and tiles are
a hundred times as large, which is what a GPU wants.

Beyond the reference: everything is float32, the student in log space, with its rest bin
by a masked log-sum-exp (§8.20); queries are tiled (§8.23); options of `LossConfig`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
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

# Finite, so that a row that sees nothing gives 0 and not NaN.
_MASKED = -1e30
# Four segments spend 5/8 of the full square where 1/2 is the least. Each one is
# compiled for itself, which short rows are not worth.
_SEGMENTS = 4
# Where a kernel makes the teacher, tiles are large and there is little to save.
_KERNEL_SEGMENTS = 2
# Of `recall_loss`: distance from the line, in spreads of a row, that counts as clear.
_SOFTNESS = 0.1
_SEGMENT_TOKENS = 1024
# Bytes of one float32 score array of a tile. A CPU wants it in its cache.
_SCORE_BYTES = {"cpu": 6 << 20}
_GPU_SCORE_BYTES = 256 << 20
_SMALLEST_TILE, _LARGEST_TILE = 16, 512
# A kernel pools the fine grid to so many keys, the geometry that it is tuned for, and
# writes one score for each, which bounds the tile in the place of [N, tile, S].
_KERNEL_POOL = 4
_LARGEST_KERNEL_TILE = 4096

Kernels = tuple[Literal["mosaic_gpu", "triton", "xla"], ...]


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


class LayerKeys(NamedTuple):
    """What a layer's queries are scored against.

    Attributes:
      grid: Key means on the teacher's grid, J = S (fine) or W (deployed).
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
        grid = token if loss.teacher == "fine" else window
        importance = self.importance
        return LayerKeys(
            self.grid[:, :, :grid],
            self.windows[:, :, :window],
            self.whole[:, :window],
            None if importance is None else importance[:, :, :window],
        )


class Queries(NamedTuple):
    """A tile of consecutive query tokens.

    Attributes:
      q: Queries after RoPE.
      phi: Forecasts for this layer, float32.
      token: Indices in the row.
      start, end: Those of `Documents`.
    """

    q: Float[Array, "B T N H"]
    phi: Float[Array, "B T K H"]
    token: Int[Array, " T"]
    start: Int[Array, "B T"]
    end: Int[Array, "B T"]


class Teacher(NamedTuple):
    """What a tile learns from.

    Attributes:
      cells: T' of the specification: teacher probability on the windows of inference,
        not normalised; 0 where the document has no such window.
      scores: The same pooled to blocks, forced blocks +∞.
      routing: Blocks to attend to.
      partition: Blocks that the loss resolves; forced ones are still among them.
    """

    cells: Float[Array, "B K T W"]
    scores: Float[Array, "B K T M"]
    routing: Int[Array, "B K T P"]
    partition: Int[Array, "B K T Q"]


class LayerLoss(NamedTuple):
    """Loss of one layer.

    Attributes:
      total: Sum over rows of weight · KL.
      weight: Sum of the weights, over tokens and kv heads: `total / weight` is the
        layer's loss.
      routing: Block lists for the layer's attention, −1 padded.
      d_phi: d total / d phi, float32, or None if it was not asked for.
      attended: What attention over `routing` gives, or None if it was not asked for.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    routing: Int[Array, "B K T P"]
    d_phi: Float[Array, "B T K H"] | None
    attended: Float[Array, "B T N H"] | None = None


def num_blocks(tokens: int, sparse: SparseConfig) -> int:
    """Blocks that a row of that many tokens fills."""
    return -(-tokens // sparse.block_size)


def _partition_sparse(sparse: SparseConfig, *, key_bias: bool) -> SparseConfig:
    """NOSA's loss knows the query-aware blocks only (§5.3)."""
    if not key_bias:
        return sparse
    quota = sparse.init_blocks + sparse.local_blocks + sparse.query_blocks
    budget = min(max(quota, sparse.forced_blocks), sparse.block_budget)
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

    The fine grid averages neighbours, k̃_j = (k_j + k_{j+1})/2 (§5.2).
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


def group_softmax(
    scores: Float[Array, "B K G T J"], seen: Bool[Array, "B T J"]
) -> Float[Array, "B K T J"]:
    """Softmax over keys for each head, summed over the heads of a group (§2.3).

    A row that sees nothing gets zeros.
    """
    mask = seen[:, None, None]
    scores = jnp.where(mask, scores, _MASKED)
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
    """Window scores (−∞: no window) → block scores with forced blocks at +∞ (§2.4)."""
    blocks = pool_to_blocks(scores, sparse.windows_per_block)
    blocks = force_blocks(blocks, own_block(queries, sparse), sparse)
    return confine(blocks, queries, sparse)


def route(
    scores: Float[Array, "B K T M"],
    queries: Queries,
    keys: LayerKeys,
    sparse: SparseConfig,
) -> Int[Array, "B K T P"]:
    """Block lists for attention; NOSA's second stage follows where it has one (§3)."""
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
    """The teacher on the windows that inference uses (§5.2).

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
                blocks=length // _KERNEL_POOL,
                block_size=_KERNEL_POOL,
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
        per_cell = sparse.kernel_stride // _KERNEL_POOL
        cells = pooled.reshape(*pooled.shape[:3], -1, per_cell).max(-1)
        exists = window_masks(queries, keys.whole, sparse)[0]
        # Blocks that a query cannot see come as −∞.
        return jnp.where(exists[:, None], jnp.maximum(cells, 0.0), 0.0)
    return None


def teach(
    queries: Queries,
    keys: LayerKeys,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
    token_scores: Float[Array, "B K G T S"] | None = None,
    kernels: Kernels = (),
) -> Teacher:
    """Teacher, and the blocks it chooses, for one tile (§5.2, §5.3)."""
    cells = kernel_cells(queries, keys, sparse=sparse, kernels=kernels)
    if cells is None:
        cells = teacher_cells(
            queries, keys, sparse=sparse, loss=loss, token_scores=token_scores
        )
    exists = window_masks(queries, keys.whole, sparse)[0]
    scores = forced(jnp.where(exists[:, None], cells, -jnp.inf), queries, sparse)
    routing = route(scores, queries, keys, sparse)
    partition = routing
    if keys.importance is not None:
        own = own_block(queries, sparse)
        length = jnp.zeros(own.shape[0], jnp.int32)
        pure = _partition_sparse(sparse, key_bias=True)
        partition = top_blocks(scores, own, length, pure)
    return Teacher(cells, scores, routing, partition)


def forecast_logits(
    queries: Queries,
    keys: LayerKeys,
    *,
    sparse: SparseConfig,
    finished_only: bool,
) -> Float[Array, "B K T W"]:
    """Scaled scores of the forecasts, very negative on windows out of sight (§5.4).

    In the reference's loss a query sees a window as soon as it has begun; inference
    selects among finished ones (`finished_only`).
    """
    _, begun, finished = window_masks(queries, keys.whole, sparse)
    scores = jnp.einsum(
        "btkh,bkwh->bktw",
        queries.phi.astype(jnp.float32),
        keys.windows.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    seen = finished if finished_only else begun
    return jnp.where(seen[:, None], scores * queries.phi.shape[-1] ** -0.5, _MASKED)


def forecast_routing(
    queries: Queries, keys: LayerKeys, *, sparse: SparseConfig
) -> Int[Array, "B K T P"]:
    """The block lists that inference makes of the forecasts (§4.3)."""
    logits = forecast_logits(queries, keys, sparse=sparse, finished_only=True)
    scores = jnp.where(logits > _MASKED, logits, -jnp.inf)
    return route(forced(scores, queries, sparse), queries, keys, sparse)


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
    scores = jnp.where(seen[:, :, None], scores, _MASKED)
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


def supervised_blocks(
    lists: Int[Array, "B K T P"], queries: Queries, blocks: int, sparse: SparseConfig
) -> Bool[Array, "B K T M"]:
    """Listed blocks that are neither init nor local: real choices (§5.5)."""
    return listed_blocks(lists, blocks) & optional_blocks(queries, blocks, sparse)


def optional_blocks(
    queries: Queries, blocks: int, sparse: SparseConfig
) -> Bool[Array, "B 1 T M"]:
    """Past blocks of the query's document that are neither init nor local."""
    block = jnp.arange(blocks)
    first = (queries.start // sparse.block_size)[:, None, :, None]
    own = (queries.token // sparse.block_size)[:, None]
    return (block >= first + sparse.init_blocks) & (block < own - sparse.local_blocks)


def partition_kl(
    target: Float[Array, "*rows C"],
    logits: Float[Array, "*rows C"],
    resolved: Bool[Array, "*rows C"],
    *,
    slots: int,
    floor: float,
) -> Float[Array, "*rows"]:
    """KL(target ‖ softmax(logits)), unresolved bins being one more bin (§5.5).

    Args:
      target: Non-negative, not normalised.
      logits: Very negative where a bin is out of the student's sight.
      resolved: Bins that count for themselves.
      slots: Most bins that can be resolved; those that are not count as empty ones.
      floor: Least probability of a bin on either side, as in the reference; 0 leaves
        the student's log-probabilities as they are.
    """
    target = target / (jnp.sum(target, axis=-1, keepdims=True) + 1e-8)
    target_rest = jnp.sum(jnp.where(resolved, 0.0, target), axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_student = logits - lse
    log_rest = jax.nn.logsumexp(jnp.where(resolved, _MASKED, log_student), axis=-1)

    p = jnp.where(resolved, jnp.maximum(target, floor), 0.0)
    p_rest = jnp.maximum(target_rest, floor)
    empty = floor * (slots - jnp.sum(resolved, axis=-1))
    p_sum = jnp.sum(p, axis=-1) + p_rest + empty
    if floor > 0:
        least = jnp.log(jnp.float32(floor))
        log_student = jnp.maximum(log_student, least)
        log_rest = jnp.maximum(log_rest, least)
    q = jnp.where(resolved, jnp.exp(log_student), 0.0)
    q_sum = jnp.sum(q, axis=-1) + jnp.exp(log_rest) + empty

    def surprise(p: Array, log_q: Array) -> Array:
        tiny = jnp.finfo(jnp.float32).tiny
        return p * (jnp.log(jnp.maximum(p, tiny)) - log_q)

    bins = jnp.where(resolved, surprise(p, log_student), 0.0)
    kl = jnp.sum(bins, axis=-1) + surprise(p_rest, log_rest)
    # Both sides are renormalised: each bin gains log(q_sum / p_sum).
    # A target without any mass teaches nothing; only a floor can give it some.
    some = jnp.where(p_sum > 0, p_sum, 1.0)
    return jnp.where(p_sum > 0, kl / some + jnp.log(q_sum) - jnp.log(some), 0.0)


def recall_loss(
    scores: Float[Array, "*rows M"],
    chosen: Bool[Array, "*rows M"],
    optional: Bool[Array, "*rows #M"],
) -> Float[Array, "*rows"]:
    """A smooth count of misplaced blocks, over the number of chosen ones.

    A student that picks as many blocks as the teacher draws its line between the last
    one in and the first one out. Every block's distance from that line, in units of the
    row's spread, passes through a sigmoid: 0 well on its side, 1 well on the wrong one.
    Misplaced blocks count alike, however little attention they would get, and the scale
    of the scores, which selection ignores, changes nothing. Rows without a choice give
    0.

    Args:
      scores: Of blocks.
      chosen: What the teacher picked among the optional ones.
      optional: Blocks that may be picked.
    """
    count = jnp.sum(chosen, axis=-1, keepdims=True)
    held = jnp.sum(optional, axis=-1, keepdims=True)
    choice = (count > 0) & (held > count)
    scores = jnp.where(optional, scores, 0.0)
    mean = jnp.sum(scores, axis=-1, keepdims=True) / jnp.maximum(held, 1)
    spread = jnp.where(optional, jnp.square(scores - mean), 0.0)
    spread = jnp.sum(spread, axis=-1, keepdims=True) / jnp.maximum(held, 1)
    spread = jnp.sqrt(jnp.where(choice, spread, 1.0) + 1e-6)
    order = -jnp.sort(-jnp.where(optional, scores, _MASKED), axis=-1)
    last = jnp.clip(count - 1, 0, scores.shape[-1] - 2)
    line = jnp.take_along_axis(order, last, -1)
    line += jnp.take_along_axis(order, last + 1, -1)
    line = jnp.where(choice, line / 2, 0.0)
    distance = (scores - line) / (_SOFTNESS * spread)
    wrong = jax.nn.sigmoid(jnp.where(chosen, -distance, distance))
    wrong = jnp.sum(jnp.where(optional & choice, wrong, 0.0), axis=-1)
    return wrong / jnp.maximum(count[..., 0], 1)


def row_weights(
    queries: Queries, *, sparse: SparseConfig, loss: LossConfig
) -> Float[Array, "B T"]:
    """How much each token counts: 1, but for padding and the options of `loss`."""
    block = sparse.block_size
    held = queries.token // block - queries.start // block + 1
    weight = jnp.ones(held.shape, jnp.float32)
    if loss.position_weight == "context":
        # The share of the context that the budget leaves out.
        weight = jnp.maximum(0.0, 1.0 - sparse.block_budget / held)
    if loss.mask_short_rows:
        weight = jnp.where(held > sparse.block_budget, weight, 0.0)
    return jnp.where(queries.token < queries.end, weight, 0.0)


def row_losses(
    queries: Queries,
    keys: LayerKeys,
    teacher: Teacher,
    *,
    slots: int,
    sparse: SparseConfig,
    loss: LossConfig,
) -> Float[Array, "B K T"]:
    """KL of every row of a tile (§5.4, §5.5); differentiable in `queries.phi`."""
    blocks = teacher.scores.shape[-1]
    resolved = supervised_blocks(teacher.partition, queries, blocks, sparse)
    by_block = loss.student == "blocks"
    logits = forecast_logits(queries, keys, sparse=sparse, finished_only=by_block)
    per_block = sparse.windows_per_block
    if by_block:
        own = own_block(queries, sparse)[..., None]
        past = jnp.arange(blocks) <= own
        target = jnp.where(past, pool_to_blocks(teacher.cells, per_block), 0.0)
        logits = jnp.maximum(pool_to_blocks(logits, per_block), _MASKED)
        if loss.target == "recall":
            optional = optional_blocks(queries, blocks, sparse)
            return recall_loss(logits, resolved, optional & (logits > _MASKED))
        logits = jnp.where(past, logits, _MASKED)
        return partition_kl(target, logits, resolved, slots=slots, floor=loss.floor)
    exists = window_masks(queries, keys.whole, sparse)[0]
    cells = jnp.repeat(resolved, per_block, axis=-1) & exists[:, None]
    return partition_kl(
        teacher.cells, logits, cells, slots=slots * per_block, floor=loss.floor
    )


def tile_size(batch: int, tokens: int, heads: int, platform: str) -> int:
    """Query tokens per tile, so that one score array stays within bounds."""
    room = _SCORE_BYTES.get(platform, _GPU_SCORE_BYTES)
    fits = room // (4 * batch * heads * tokens)
    size = _SMALLEST_TILE
    while size < _LARGEST_TILE and 2 * size <= fits:
        size *= 2
    return min(size, -(-tokens // _SMALLEST_TILE) * _SMALLEST_TILE)


def kernel_tile_size(batch: int, tokens: int, kv_heads: int) -> int:
    """The same where a kernel makes the teacher."""
    fits = _GPU_SCORE_BYTES * _KERNEL_POOL // (4 * batch * kv_heads * tokens)
    size = _SMALLEST_TILE
    while size < _LARGEST_KERNEL_TILE and 2 * size <= min(fits, tokens):
        size *= 2
    return size


def tile_queries(
    q: Float[Array, "B T N H"],
    phi: Float[Array, "B T K H"],
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
        jnp.pad(phi.astype(jnp.float32), (*widths, (0, 0), (0, 0))),
        jnp.pad(documents.start, widths),
        jnp.pad(documents.end, widths),
    )

    def cut(index: Int[Array, ""]) -> Queries:
        first = index * size
        q, phi, start, end = (
            jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in row
        )
        return Queries(q, phi, first + jnp.arange(size), start, end)

    return tiles, cut


def stream_tiles[Out](
    one_tile: Callable[[Int[Array, ""], int], Out],
    *,
    tokens: int,
    size: int,
    sparse: SparseConfig,
    segments: int = _SEGMENTS,
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


def distill_layer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    phi: Float[Array, "B T K H"],
    documents: Documents,
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
    with_gradient: bool,
    v: Float[Array, "B T K H"] | None = None,
    kernels: Kernels = (),
) -> LayerLoss:
    """Loss, block lists and, if wanted, the gradient for one layer's forecasts.

    Args:
      q: The layer's queries after RoPE.
      k: Its keys after RoPE.
      phi: What the layer before (layer 0: it itself) forecast for it, after RoPE.
      documents: Which tokens belong together.
      key_bias: NOSA's c per token, or None.
      sparse: Block geometry and budget. With `mask_future_blocks=False` (parity with
        the reference) the lists may hold what the reference's do.
      loss: Variant of the loss.
      with_gradient: Also return d total / d phi.
      v: Values, to attend as well: a tile's scores then serve the teacher and
        attention, which masks what is not listed. Worth it where a row is only a few
        times the budget.
      kernels: Kernels that may make a fine teacher aligned by the maximum
        (`kernel_cells`), where every row is one document and `v` is not given.

    Source: specification §5.2-5.5; memory is that of one tile's scores (§8.23).
    """
    sparse = dataclasses.replace(sparse, dense_len=-1)
    batch, tokens, heads, _ = q.shape
    keys = layer_keys(k, documents, key_bias, sparse=sparse, loss=loss)
    served = loss.teacher == "fine" and loss.align == "max" and v is None
    kernels = kernels if served and sparse.kernel_stride % _KERNEL_POOL == 0 else ()
    if kernels:
        size = loss.tile or kernel_tile_size(batch, tokens, k.shape[2])
    else:
        size = loss.tile or tile_size(batch, tokens, heads, jax.default_backend())
    pure = _partition_sparse(sparse, key_bias=key_bias is not None)
    count = num_blocks(tokens, sparse)
    slots = min(pure.block_budget, count)
    width = min(sparse.block_budget, count)
    cut = tile_queries(q, phi, documents, size)[1]
    plain = values = bias = None
    if v is not None:
        plain, values = padded_heads(k, sparse), padded_heads(v, sparse)
        bias = None if key_bias is None else padded_heads(key_bias, sparse)

    def one_tile(index: Int[Array, ""], reach: int):
        queries, near = cut(index), keys.before(reach, loss, sparse)
        scores = None if plain is None else head_scores(queries.q, plain[:, :, :reach])
        teacher = teach(
            queries,
            near,
            sparse=sparse,
            loss=loss,
            token_scores=scores,
            kernels=kernels,
        )
        weight = row_weights(queries, sparse=sparse, loss=loss)

        def total(phi: Array) -> Array:
            rows = row_losses(
                queries._replace(phi=phi),
                near,
                teacher,
                slots=slots,
                sparse=sparse,
                loss=loss,
            )
            return jnp.sum(rows * weight[:, None])

        if with_gradient:
            value, d_phi = jax.value_and_grad(total)(queries.phi)
        else:
            value, d_phi = total(queries.phi), None
        routing = teacher.routing
        if loss.on_policy:
            routing = forecast_routing(queries, near, sparse=sparse)
        attended = None
        if scores is not None and values is not None:
            if bias is not None:
                scores = scores + bias[:, :, None, None, :reach]
            attended = attend_listed(
                scores, values[:, :, :reach], routing, queries, sparse
            )
        missing = width - routing.shape[-1]
        routing = jnp.pad(routing, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)
        return value, jnp.sum(weight), routing, d_phi, attended

    value, weight, routing, d_phi, attended = stream_tiles(
        one_tile,
        tokens=tokens,
        size=size,
        sparse=sparse,
        segments=_KERNEL_SEGMENTS if kernels else _SEGMENTS,
    )
    return LayerLoss(
        total=jnp.sum(value),
        weight=jnp.sum(weight) * k.shape[2],
        routing=join_tiles(routing, 2, tokens),
        d_phi=None if d_phi is None else join_tiles(d_phi, 1, tokens),
        attended=None if attended is None else join_tiles(attended, 1, tokens),
    )


def distillation_loss(
    phi: Float[Array, "B T K H"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    documents: Documents,
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    sparse: SparseConfig,
    loss: LossConfig,
) -> Float[Array, ""]:
    """The layer's loss as a function of `phi` alone, for `jax.grad`.

    Differentiating it keeps no scores: the tiles' gradients are made on the way.
    """

    def run(phi: Array, *, with_gradient: bool) -> tuple[Array, Array | None]:
        out = distill_layer(
            q,
            k,
            phi,
            documents,
            key_bias,
            sparse=sparse,
            loss=loss,
            with_gradient=with_gradient,
        )
        weight = jnp.maximum(out.weight, 1.0)
        d_phi = None if out.d_phi is None else out.d_phi / weight
        return out.total / weight, d_phi

    @jax.custom_vjp
    def value(phi: Array) -> Array:
        return run(phi, with_gradient=False)[0]

    def forward(phi: Array) -> tuple[Array, Array]:
        mean, d_phi = run(phi, with_gradient=True)
        assert d_phi is not None
        return mean, d_phi

    def backward(d_phi: Array, cotangent: Array) -> tuple[Array]:
        return ((d_phi * cotangent).astype(phi.dtype),)

    value.defvjp(forward, backward)
    return value(phi)
