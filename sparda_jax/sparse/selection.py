"""Block selection: window scores → block scores → the row's block list.

Everything here works on one tile of query tokens, so nothing of size T×W or T×M is held
for a long T. Scores are float32; ties go to the lowest block index, as `lax.top_k` does
(neighbouring blocks share a window, so exact ties are common; docs/algorithm.md §7.1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.choose_blocks.api import choose_blocks
from pallas_kernels.choose_blocks.forced import Forced
from sparda_jax.config import SparseConfig
from sparda_jax.sparse.compression import Int8CompressedKeys
from sparda_jax.sparse.masked import masked_softmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionTile:
    """What a selector sees for T consecutive query tokens of every row.

    Attributes:
      q: Queries after RoPE [B, T, N, H]; None while the layer before looks ahead.
      forecast: What the layer before made of these tokens for this one, or None: a
        query [B, T, K·R, H] as a rule, or block scores (`Selector.hands_on_scores`).
      positions: [B, T].
      length: Keys that each row holds once its whole prompt or step is in [B].
      index: The selector's index of the layer, by part.
      num_blocks: M, blocks of capacity per row.
      decoding: The tile is one decode step.
      layer: The layer's number.
    """

    q: Float[Array, "B T N H"] | None
    forecast: Float[Array, "B T heads F"] | None
    positions: Int[Array, "B T"]
    length: Int[Array, " B"]
    index: dict[str, Any]
    num_blocks: int = dataclasses.field(metadata={"static": True})
    decoding: bool = dataclasses.field(metadata={"static": True})
    layer: int | Int[Array, ""] = 0

    @property
    def windows(self) -> Float[Array, "B K W H"]:
        """Key means of the layer, W = M·ρ."""
        return self.index["key_means"].windows

    @property
    def forecast_is_summed(self) -> bool:
        """Whether the forecast holds several queries a kv head."""
        return self.forecast is not None and (
            self.forecast.shape[2] > self.windows.shape[1]
        )

    @property
    def importance(self) -> Float[Array, "B K W"] | None:
        """NOSA's c averaged over the same windows; None where it is not kept."""
        part = self.index.get("importance")
        return None if part is None else part.windows[..., 0]


def _visible(
    tile: SelectionTile, sparse: SparseConfig, *, by_start: bool = False
) -> Bool[Array, "B #K T W"]:
    """Windows that a query may look at.

    The rule is "wholly in the past", σm + κ − 1 ≤ i. The reference's Forecast prefill
    asks only for the window's start, σm ≤ i (`by_start`); once future blocks are
    masked both select the same blocks, since the windows in which they differ belong to
    forced local blocks (docs/algorithm.md §4.3, §7.2).
    """
    window = jnp.arange(tile.windows.shape[2])
    first = window * sparse.kernel_stride
    last = first + sparse.kernel_size - 1
    finished = last < tile.length[:, None]  # B W
    edge = first if by_start else last
    past = edge <= tile.positions[:, :, None]  # B T W
    return (past & finished[:, None, :])[:, None]


def own_query_scores(
    tile: SelectionTile, sparse: SparseConfig
) -> Float[Array, "B K T W"]:
    """InfLLM-V2: softmax over windows per head, summed over the group.

    Invisible windows get 0 and a row that sees none gets zeros.

    Source: docs/algorithm.md §2.3.
    """
    assert tile.q is not None
    return summed_softmax_scores(tile.q, tile, sparse)


def summed_softmax_scores(
    query: Float[Array, "B T heads H"], tile: SelectionTile, sparse: SparseConfig
) -> Float[Array, "B K T W"]:
    """`own_query_scores` of any queries, as many a kv head as there are."""
    batch, steps, heads, dim = query.shape
    kv_heads = tile.windows.shape[1]
    q = query.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "btkgh,bkwh->bkgtw",
        q,
        tile.windows.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    seen = _visible(tile, sparse)[:, :, None]
    scores = jnp.where(seen, scores * dim**-0.5, -jnp.inf)
    return jnp.sum(masked_softmax(scores), axis=2)


def forecast_scores(
    tile: SelectionTile, sparse: SparseConfig
) -> Float[Array, "B K T W"]:
    """SparDA: raw dot product of the forecast, one head a group.

    No scale, no softmax, no sum over heads: the ranking needs none of them. Invisible
    windows get −∞. Several queries a group are scored as own queries are.

    Source: docs/algorithm.md §4.3.
    """
    assert tile.forecast is not None
    if tile.forecast_is_summed:
        return summed_softmax_scores(tile.forecast, tile, sparse)
    keys = tile.index["key_means"]
    if tile.decoding and isinstance(keys, Int8CompressedKeys):
        scores = keys.scores(tile.forecast)
    else:
        scores = jnp.einsum(
            "btkh,bkwh->bktw",
            tile.forecast,
            tile.windows.astype(tile.forecast.dtype),
            preferred_element_type=jnp.float32,
        )
    by_start = not sparse.mask_future_blocks and not tile.decoding
    return jnp.where(_visible(tile, sparse, by_start=by_start), scores, -jnp.inf)


def pool_to_blocks(
    scores: Float[Array, "*rows W"], windows_per_block: int
) -> Float[Array, "*rows M"]:
    """Max over the windows that touch a block: m ∈ [ρb − 1, ρb + ρ − 1].

    Source: docs/algorithm.md §2.4.
    """
    grouped = scores.reshape(*scores.shape[:-1], -1, windows_per_block)
    inside = jnp.max(grouped, axis=-1)
    before = jnp.pad(
        grouped[..., :-1, -1],
        [(0, 0)] * (grouped.ndim - 2) + [(1, 0)],
        constant_values=-jnp.inf,
    )
    return jnp.maximum(inside, before)


def force_blocks(
    scores: Float[Array, "B K #T M"],
    query_block: Int[Array, "B #K T"],
    sparse: SparseConfig,
) -> Float[Array, "B K T M"]:
    """+∞ on init and local blocks, −∞ on future ones unless kept for parity.

    Forced blocks alone have +∞: no score ties with them, so that none of them is ever
    dropped for another block. What is not a number ranks last.

    Source: docs/algorithm.md §2.4.
    """
    block = jnp.arange(scores.shape[-1])
    own = query_block[..., None]
    local = (block >= own - sparse.local_blocks) & (block <= own)
    most = jnp.finfo(scores.dtype).max
    scores = jnp.nan_to_num(scores, nan=-jnp.inf, posinf=most, neginf=-jnp.inf)
    scores = jnp.where((block < sparse.init_blocks) | local, jnp.inf, scores)
    if sparse.mask_future_blocks:
        scores = jnp.where(block <= own, scores, -jnp.inf)
    return scores


def budget_width(sparse: SparseConfig, num_blocks: int) -> int:
    """P, the length of block lists: the budget, or what dense rows need.

    Source: docs/algorithm.md §2.6.
    """
    dense = -(-sparse.dense_len // sparse.block_size) if sparse.dense_len > 0 else 0
    return min(max(sparse.largest_budget, dense), num_blocks)


def top_blocks(
    scores: Float[Array, "B K T M"],
    query_block: Int[Array, "B #K T"],
    length: Int[Array, " B"],
    sparse: SparseConfig,
    *,
    layer: int | Int[Array, ""] = 0,
    force: bool = False,
) -> Int[Array, "B K T P"]:
    """The best blocks of each row, in any order; −1 where there is none.

    With budgets by layer, P is the largest, and `layer` lists as many as its own says.
    Rows shorter than `dense_len` take all their blocks instead. With `force` the scores
    are not yet those of `force_blocks`: the choice then does its work on the way.

    Source: docs/algorithm.md §2.4.
    """
    width = budget_width(sparse, scores.shape[-1])
    budget = min(sparse.largest_budget, width)
    forced, by_layer = None, isinstance(sparse.block_budget, tuple)
    if force and by_layer:
        scores = force_blocks(scores, query_block, sparse)
    elif force:
        local = sparse.local_blocks + 1
        forced = Forced(sparse.init_blocks, local, sparse.mask_future_blocks)
    lists = choose_blocks(scores, query_block, budget=budget, forced=forced)
    if by_layer:
        lists = _best_of_lists(lists, scores, _layer_budget(sparse, layer))
    if sparse.dense_len <= 0:
        return lists
    lists = jnp.pad(lists, ((0, 0),) * 3 + ((0, width - budget),), constant_values=-1)
    block = jnp.arange(width, dtype=jnp.int32)
    everything = jnp.where(block <= query_block[..., None], block, -1)
    dense = (length < sparse.dense_len)[:, None, None, None]
    return jnp.where(dense, everything, lists)


def _layer_budget(
    sparse: SparseConfig, layer: int | Int[Array, ""]
) -> int | Int[Array, ""]:
    """Blocks that a token of a layer selects."""
    if not isinstance(sparse.block_budget, tuple):
        return sparse.block_budget
    return jnp.asarray(sparse.block_budget, jnp.int32)[layer]


def _best_of_lists(
    lists: Int[Array, "B K T P"],
    scores: Float[Array, "B K T M"],
    budget: int | Int[Array, ""],
) -> Int[Array, "B K T P"]:
    """The best `budget` blocks of each list; ties go to the lowest block."""
    listed = jnp.take_along_axis(scores, jnp.maximum(lists, 0), axis=-1)
    listed = jnp.where(lists >= 0, listed, -jnp.inf)
    _, best = jax.lax.sort((-listed, lists), num_keys=2)
    return jnp.where(jnp.arange(best.shape[-1]) < budget, best, -1)


def constrain_by_importance(
    scores: Float[Array, "B K T M"],
    importance: Float[Array, "B K W"],
    query_block: Int[Array, "B #K T"],
    sparse: SparseConfig,
    *,
    layer: int | Int[Array, ""] = 0,
) -> Float[Array, "B K T M"]:
    """NOSA's second stage: query-aware blocks first, then by importance.

    Args:
      scores: Forced block scores of the first stage.
      importance: Window means of c; unfinished windows must hold −∞.
      query_block: The query's own block.
      sparse: `query_blocks` more than the init and local ones come from `scores`, as
        far as the layer's budget has room for them beside the forced blocks.
      layer: The layer, where budgets differ by it.

    Returns:
      Scores whose top `block_budget` are the selection: +∞ on the first stage's picks,
      the pooled importance elsewhere.

    Source: docs/algorithm.md §3.
    """
    blocks = scores.shape[-1]
    quota = sparse.init_blocks + sparse.local_blocks + sparse.query_blocks
    # Picks and forced blocks all get +∞ below. More of them than the budget would tie,
    # and the row's own block, the last one, would lose.
    best, picks = jax.lax.top_k(scores, min(quota, sparse.largest_budget, blocks))
    if isinstance(sparse.block_budget, tuple):
        room = jnp.arange(picks.shape[-1]) < _layer_budget(sparse, layer)
        picks = jnp.where(room, picks, blocks)
    agnostic = pool_to_blocks(importance, sparse.windows_per_block)[:, :, None]
    agnostic = force_blocks(agnostic, query_block, sparse)
    block = jnp.arange(blocks)
    agnostic = jnp.where(block <= query_block[..., None], agnostic, -jnp.inf)
    if sparse.mask_future_blocks:
        picks = jnp.where(best > -jnp.inf, picks, blocks)
    lead = jnp.ogrid[tuple(slice(size) for size in scores.shape[:3])]
    rows = tuple(index[..., None] for index in lead)
    return agnostic.at[(*rows, picks)].set(jnp.inf, mode="drop")


def sorted_blocks(blocks: Int[Array, "*rows P"]) -> Int[Array, "*rows P"]:
    """Block lists in ascending order, −1 last: the form of the reference's lists."""
    last = jnp.iinfo(blocks.dtype).max
    ordered = jnp.sort(jnp.where(blocks < 0, last, blocks), axis=-1)
    return jnp.where(ordered == last, -1, ordered)
