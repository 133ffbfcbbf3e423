"""How far the student is from the teacher, row by row (docs/algorithm.md §5.4, §5.5).

The student is the forecast of the layer before, scored on the key means that inference
uses. The loss is the forward KL of teacher and student over the windows of the blocks
that the teacher chose, all other windows being one more bin; or a smooth count of the
blocks that the student would misplace.

Beyond the reference: everything is float32, the student in log space, with its rest bin
by a masked log-sum-exp (docs/algorithm.md §7.6).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.sparse.selection import pool_to_blocks
from train.config import LossConfig
from train.teacher import LayerKeys, Teacher, forced, own_block, route, window_masks
from train.tiles import MASKED, Queries, listed_blocks


def forecast_logits(
    queries: Queries,
    keys: LayerKeys,
    *,
    sparse: SparseConfig,
    finished_only: bool,
) -> Float[Array, "B K T W"]:
    """Scaled scores of the forecasts, very negative on windows out of sight.

    In the reference's loss a query sees a window as soon as it has begun; inference
    selects among finished ones (`finished_only`). Several queries a kv head give the
    logarithm of the mean of their softmaxes, which ranks as inference does.

    Source: docs/algorithm.md §5.4.
    """
    _, begun, finished = window_masks(queries, keys.whole, sparse)
    batch, tokens, heads, dim = queries.forecast.shape
    kv_heads = keys.windows.shape[1]
    forecast = queries.forecast.astype(jnp.float32)
    scores = jnp.einsum(
        "btkrh,bkwh->brktw",
        forecast.reshape(batch, tokens, kv_heads, heads // kv_heads, dim),
        keys.windows.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    seen = finished if finished_only else begun
    scores = jnp.where(seen[:, None, None], scores * dim**-0.5, MASKED)
    if heads == kv_heads:
        return scores[:, 0]
    logs = jax.nn.log_softmax(scores, axis=-1)
    mean = jax.nn.logsumexp(logs, axis=1) - jnp.log(heads // kv_heads)
    return jnp.where(seen[:, None], mean, MASKED)


def forecast_routing(
    queries: Queries, keys: LayerKeys, *, sparse: SparseConfig
) -> Int[Array, "B K T P"]:
    """The block lists that inference makes of the forecasts.

    Source: docs/algorithm.md §4.3.
    """
    logits = forecast_logits(queries, keys, sparse=sparse, finished_only=True)
    scores = jnp.where(logits > MASKED, logits, -jnp.inf)
    return route(forced(scores, queries, sparse), queries, keys, sparse)


def supervised_blocks(
    lists: Int[Array, "B K T P"], queries: Queries, blocks: int, sparse: SparseConfig
) -> Bool[Array, "B K T M"]:
    """Listed blocks that are neither init nor local: real choices.

    Source: docs/algorithm.md §5.5.
    """
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
    """KL(target ‖ softmax(logits)), unresolved bins being one more bin.

    Args:
      target: Non-negative, not normalised.
      logits: Very negative where a bin is out of the student's sight.
      resolved: Bins that count for themselves.
      slots: Most bins that can be resolved; those that are not count as empty ones.
      floor: Least probability of a bin on either side, as in the reference; 0 leaves
        the student's log-probabilities as they are.

    Source: docs/algorithm.md §5.5.
    """
    target = target / (jnp.sum(target, axis=-1, keepdims=True) + 1e-8)
    target_rest = jnp.sum(jnp.where(resolved, 0.0, target), axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_student = logits - lse
    log_rest = jax.nn.logsumexp(jnp.where(resolved, MASKED, log_student), axis=-1)

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
    softness: float = 0.1,
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
      softness: Distance from the line, in spreads of a row, that counts as clear.
    """
    count = jnp.sum(chosen, axis=-1, keepdims=True)
    held = jnp.sum(optional, axis=-1, keepdims=True)
    choice = (count > 0) & (held > count)
    scores = jnp.where(optional, scores, 0.0)
    mean = jnp.sum(scores, axis=-1, keepdims=True) / jnp.maximum(held, 1)
    spread = jnp.where(optional, jnp.square(scores - mean), 0.0)
    spread = jnp.sum(spread, axis=-1, keepdims=True) / jnp.maximum(held, 1)
    spread = jnp.sqrt(jnp.where(choice, spread, 1.0) + 1e-6)
    order = -jnp.sort(-jnp.where(optional, scores, MASKED), axis=-1)
    last = jnp.clip(count - 1, 0, scores.shape[-1] - 2)
    line = jnp.take_along_axis(order, last, -1)
    line += jnp.take_along_axis(order, last + 1, -1)
    line = jnp.where(choice, line / 2, 0.0)
    distance = (scores - line) / (softness * spread)
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
        weight = jnp.maximum(0.0, 1.0 - sparse.largest_budget / held)
    if loss.mask_short_rows:
        weight = jnp.where(held > sparse.largest_budget, weight, 0.0)
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
    """KL of every row of a tile; differentiable in `queries.forecast`.

    Source: docs/algorithm.md §5.4, §5.5.
    """
    blocks = teacher.scores.shape[-1]
    resolved = supervised_blocks(teacher.partition, queries, blocks, sparse)
    by_block = loss.student == "blocks"
    logits = forecast_logits(queries, keys, sparse=sparse, finished_only=by_block)
    per_block = sparse.windows_per_block
    if by_block:
        own = own_block(queries, sparse)[..., None]
        past = jnp.arange(blocks) <= own
        target = jnp.where(past, pool_to_blocks(teacher.cells, per_block), 0.0)
        logits = jnp.maximum(pool_to_blocks(logits, per_block), MASKED)
        if loss.target == "recall":
            optional = optional_blocks(queries, blocks, sparse)
            seen = optional & (logits > MASKED)
            return recall_loss(logits, resolved, seen, loss.softness)
        logits = jnp.where(past, logits, MASKED)
        return partition_kl(target, logits, resolved, slots=slots, floor=loss.floor)
    exists = window_masks(queries, keys.whole, sparse)[0]
    cells = jnp.repeat(resolved, per_block, axis=-1) & exists[:, None]
    return partition_kl(
        teacher.cells, logits, cells, slots=slots * per_block, floor=loss.floor
    )
