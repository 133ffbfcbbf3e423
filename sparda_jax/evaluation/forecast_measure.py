"""What Forecast heads choose, measured against own queries and the true attention mass.

A row of tokens goes through the layers once, as prefill runs them: the same
projections, index, scores, forced blocks and order of blocks. Beside the layer's own
queries, whose lists are attended to, each token's forecast and its attention
probabilities rank the blocks, so that every budget is read off one pass:

  recall   of the blocks that the own query chooses, forced ones left out, the share
           that the forecast chooses as well
  mass     attention probability that falls into the chosen blocks: of the forecast, of
           the own query, and of the oracle, which knows that mass

Tokens whose context fits the budget count for nothing: nothing is chosen there.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from sparda_jax.cache.settings import LayerSettings, TileState
from sparda_jax.checks import require
from sparda_jax.engine.model import LanguageModel
from sparda_jax.inference.layer import LayerBlock
from sparda_jax.models.block import add_attention, add_mlp, before_attention
from sparda_jax.models.decoder import DecoderLayer, embed
from sparda_jax.models.rope import RopeCosSin, model_rope, rope_cos_sin_at
from sparda_jax.planning.traces import WARM_STEPS, slot_misses
from sparda_jax.sparse.index import (
    IndexShape,
    IndexState,
    NewTokens,
    TokenKV,
    append_to_index,
    init_index,
)
from sparda_jax.sparse.selection import force_blocks, top_blocks

# Bytes of one float32 array of a tile's scores; a CPU wants it in its cache.
_SCORE_BYTES = {"cpu": 8 << 20}
_GPU_SCORE_BYTES = 256 << 20
_SMALLEST_TILE, _LARGEST_TILE = 16, 512
# Slots of a cache, in lists.
SLOT_LISTS = (1.0, 1.5, 2.0, 3.0, 4.0)


@dataclasses.dataclass(frozen=True)
class MeasurePlan:
    """What is read off a pass.

    Attributes:
      budget: Blocks of a list, forced ones included.
      budgets: Budgets that are compared, ascending; `budget` is one of them.
      edges: Positions between which tokens are counted together, ascending, one more
        than there are buckets. The first is what the budget holds.
      distances: Blocks between a token's own and a chosen one, edges as above.
      steps: Tokens at a row's end whose lists are replayed through caches.
    """

    budget: int
    budgets: tuple[int, ...]
    edges: tuple[int, ...]
    distances: tuple[int, ...]
    steps: int

    @property
    def at(self) -> int:
        """Index of `budget` in `budgets`."""
        return self.budgets.index(self.budget)


def make_plan(lm: LanguageModel, tokens: int, *, buckets: int = 6) -> MeasurePlan:
    """Budgets from a third of the model's to four times it, and equal buckets.

    Raises:
      ConfigError: If rows of that many tokens hold no more than the budget, or there is
        a budget by layer: the report compares layers at equal ones.
    """
    sparse = lm.sparse
    budget, size = sparse.largest_budget, sparse.block_size
    field = "SparseConfig.block_budget"
    require(budget == sparse.smallest_budget, field, sparse.block_budget, "one number")
    blocks, first = -(-tokens // size), budget * size
    require(
        blocks > budget, "tokens", tokens, f"above the {first} that the budget holds"
    )
    scored = budget - sparse.forced_blocks
    grid = {
        sparse.forced_blocks + round(scored * share)
        for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1, 5 / 4, 3 / 2, 2, 3, 4)
    }
    budgets = sorted({min(max(b, sparse.forced_blocks + 1), blocks) for b in grid})
    budgets = sorted({*budgets, budget})
    edges = np.unique(np.linspace(first, tokens, buckets + 1).round().astype(int))
    distances = [sparse.local_blocks + 1]
    while distances[-1] < blocks:
        distances.append(distances[-1] * 2)
    return MeasurePlan(
        budget=budget,
        budgets=tuple(budgets),
        edges=tuple(edges.tolist()),
        distances=tuple(distances),
        steps=min(512, tokens - first),
    )


class LayerSums(NamedTuple):
    """Sums over the tokens of a layer, by bucket of their positions (R of them).

    Attributes:
      rows: Tokens that count.
      hits, wanted: Blocks that forecast and own query choose; that the own query does.
      forecast_mass, own_mass, oracle_mass: Attention mass in the lists, by query head.
      missed, distance: Of the budget's lists by distance (D edges less one): blocks
        that the forecast leaves out, blocks that the own query chooses.
    """

    rows: Float[Array, "*L R"]
    hits: Float[Array, "*L budgets K R"]
    wanted: Float[Array, "*L budgets K R"]
    forecast_mass: Float[Array, "*L budgets N R"]
    own_mass: Float[Array, "*L budgets N R"]
    oracle_mass: Float[Array, "*L budgets N R"]
    missed: Float[Array, "*L K D R"]
    distance: Float[Array, "*L K D R"]


class _Tile(NamedTuple):
    """A tile's queries and forecasts, and where it begins."""

    q: Float[Array, "1 t N H"]
    forecast: Float[Array, "1 t K H"]
    start: Int[Array, ""]


def block_places(ranking: Float[Array, "K t M"]) -> Int[Array, "K t M"]:
    """The place of each block in its row's order; ties go to the lowest block."""
    order = jnp.argsort(-ranking, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def block_mass(
    q: Float[Array, "t N H"],
    k: Float[Array, "K S H"],
    key_bias: Float[Array, "K S"] | None,
    positions: Int[Array, " t"],
    block_size: int,
) -> Float[Array, "N t M"]:
    """Attention probability of every block, by query head."""
    tokens, heads, dim = q.shape
    grouped = q.reshape(tokens, k.shape[0], -1, dim)
    scores = jnp.einsum(
        "tkgh,ksh->kgts", grouped, k, preferred_element_type=jnp.float32
    )
    scores = scores * dim**-0.5
    if key_bias is not None:
        scores = scores + key_bias[:, None, None]
    seen = jnp.arange(k.shape[1]) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return weights.reshape(heads, tokens, -1, block_size).sum(-1)


def _spread(
    values: Num[Array, "*lead t"], buckets: Float[Array, "t R"]
) -> Float[Array, "*lead R"]:
    return jnp.einsum("...t,tr->...r", values.astype(jnp.float32), buckets)


def tile_sums(
    rankings: tuple[Float[Array, "K t M"], Float[Array, "K t M"]],
    mass: Float[Array, "N t M"],
    positions: Int[Array, " t"],
    settings: LayerSettings,
    plan: MeasurePlan,
    tokens: int,
) -> tuple[LayerSums, Bool[Array, "2 K t M"]]:
    """The sums of a tile, and what forecast and own query list at the budget."""
    sparse = settings.sparse
    kv_heads, group = settings.config.num_kv_heads, settings.config.group_size
    own = positions // sparse.block_size
    block = jnp.arange(mass.shape[-1])
    past = block <= own[:, None]
    optional = (block >= sparse.init_blocks) & (
        block < own[:, None] - sparse.local_blocks
    )
    of_group = mass.reshape(kv_heads, group, *mass.shape[1:]).mean(1)
    best = force_blocks(of_group[None], own[None, None], sparse)[0]
    forecast, chosen, oracle = (block_places(x) for x in (*rankings, best))
    edges = jnp.asarray(plan.edges)
    counted = (own + 1 > plan.budget) & (positions < tokens)
    inside = (positions[:, None] >= edges[:-1]) & (positions[:, None] < edges[1:])
    buckets = (inside & counted[:, None]).astype(jnp.float32)

    def of_budget(budget: int) -> tuple[Array, ...]:
        lists = [(x < budget) & past for x in (forecast, chosen, oracle)]
        wanted = lists[1] & optional
        counts = ((lists[0] & wanted).sum(-1), wanted.sum(-1))
        masses = (jnp.sum(mass * jnp.repeat(x, group, axis=0), axis=-1) for x in lists)
        return tuple(_spread(x, buckets) for x in (*counts, *masses))

    by_budget = [jnp.stack(x) for x in zip(*map(of_budget, plan.budgets), strict=True)]
    listed = jnp.stack([(x < plan.budget) & past for x in (forecast, chosen)])
    far = own[:, None] - block
    near = jnp.asarray(plan.distances)
    distance = (far[..., None] >= near[:-1]) & (far[..., None] < near[1:])
    distance = distance.astype(jnp.float32)
    wanted = (listed[1] & optional).astype(jnp.float32)
    missed = wanted * ~listed[0]
    by_distance = (
        _spread(jnp.einsum("ktm,tmd->kdt", x, distance), buckets)
        for x in (missed, wanted)
    )
    return LayerSums(buckets.sum(0), *by_budget, *by_distance), listed


def _tile_size(heads: int, tokens: int) -> int:
    room = _SCORE_BYTES.get(jax.default_backend(), _GPU_SCORE_BYTES)
    size = _SMALLEST_TILE
    while size < _LARGEST_TILE and 2 * size * heads * tokens * 4 <= room:
        size *= 2
    return size


def filled_index(settings: LayerSettings, tokens: TokenKV) -> IndexState:
    """A layer's index of one row that holds all of its tokens."""
    _, count, heads, dim = tokens.k.shape
    blocks = -(-count // settings.sparse.block_size)
    shape = IndexShape(1, 1, heads, blocks, dim, tokens.k.dtype)
    empty = init_index(settings.indices, shape, settings.sparse)
    start, count = jnp.zeros((1,), jnp.int32), jnp.full((1,), count, jnp.int32)
    new = NewTokens(tokens, 0, start, count)
    return append_to_index(settings.indices, empty, new, settings.sparse)


@functools.partial(jax.jit, static_argnames=("settings", "plan"))
def measure_layer(
    block: LayerBlock,
    hidden: Float[Array, "1 T D"],
    before: Float[Array, "1 T D"],
    rope_cos_sin: RopeCosSin,
    settings: LayerSettings,
    plan: MeasurePlan,
) -> tuple[
    Float[Array, "1 T D"], Float[Array, "1 T D"], LayerSums, Bool[Array, "2 K s M"]
]:
    """Runs a layer on a whole row and measures it.

    Args:
      block: The layer's weights, the Forecast head that it consumes, its number.
      hidden: Its input.
      before: What the forecast reads of the layer before; of layer 0, anything.
      rope_cos_sin: cos and sin of all tokens.
      settings: The model and its selection.
      plan: What is read off.

    Returns:
      Its output, what the next layer's forecast reads of it, the sums, and whether the
      forecast's and the own query's lists of the last `plan.steps` tokens hold each
      block.
    """
    config, sparse, selector = settings.config, settings.sparse, settings.selector
    x, q, k, v, key_bias = before_attention(block.weights, config, hidden, rope_cos_sin)
    source = jnp.where(block.number == 0, x, before)
    forecast = selector.next_query(block.next_query, source, rope_cos_sin)
    tokens = hidden.shape[1]
    blocks = -(-tokens // sparse.block_size)
    size = _tile_size(config.num_heads, tokens)
    tiles = -(-tokens // size)
    index = filled_index(settings, TokenKV(k, v, key_bias, q))
    room = ((0, 0), (0, blocks * sparse.block_size - tokens))
    keys, values = (
        jnp.swapaxes(jnp.pad(x, (*room, (0, 0), (0, 0))), 1, 2) for x in (k, v)
    )
    bias = None
    if key_bias is not None:
        bias = jnp.swapaxes(jnp.pad(key_bias, (*room, (0, 0))), 1, 2)
    widths = ((0, 0), (0, tiles * size - tokens), (0, 0), (0, 0))
    queries, forecasts = jnp.pad(q, widths), jnp.pad(forecast, widths)

    def one_tile(number_of_tile: Int[Array, ""]):
        start = number_of_tile * size
        tile_q, tile_f = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
            for x in (queries, forecasts)
        )
        state = TileState(
            start=start[None],
            count=jnp.full((1,), size, jnp.int32),
            length=jnp.full((1,), tokens, jnp.int32),
            rope_cos_sin=rope_cos_sin,
            num_blocks=blocks,
            decoding=False,
            layer=block.number,
        )
        seen = state.selection(index, 0, forecast=tile_f)
        ahead = selector.ranking(seen, config, sparse, settings.implementation)
        seen = state.selection(index, 0, q=tile_q)
        own = settings.own_query.ranking(seen, config, sparse, settings.implementation)
        positions = start + jnp.arange(size)
        mass = block_mass(
            tile_q[0],
            keys[0],
            None if bias is None else bias[0],
            positions,
            sparse.block_size,
        )
        sums, listed = tile_sums(
            (ahead[0], own[0]), mass, positions, settings, plan, tokens
        )
        at = (positions // sparse.block_size)[None, None]
        lists = top_blocks(own, at, state.length, sparse)
        return sums, listed, lists[0]

    sums, listed, lists = jax.lax.map(one_tile, jnp.arange(tiles))
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    listed = jnp.moveaxis(listed, 0, 2).reshape(*listed.shape[1:3], -1, blocks)
    lists = jnp.moveaxis(lists, 0, 1).reshape(lists.shape[1], -1, lists.shape[-1])
    kv = jnp.stack((keys, values), axis=3)
    attended = block_sparse_attention(
        q,
        kv.reshape(*kv.shape[:2], blocks, sparse.block_size, 2, -1),
        q_start=jnp.zeros((1,), jnp.int32),
        block_indices=lists[None, :, :tokens],
        key_bias=(None if bias is None else bias.reshape(*bias.shape[:2], blocks, -1)),
        implementation=settings.implementation,
    )
    attended = attended.reshape(*hidden.shape[:2], -1)
    middle, read = add_attention(block.weights, config, hidden, attended)
    out = add_mlp(block.weights, config, middle, read)
    x = read if selector.asks_late(config) else x
    return out, x, sums, listed[:, :, tokens - plan.steps : tokens]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one text gave.

    Attributes:
      rows, tokens: How many rows of how many tokens.
      sums: Of all layers, float64 NumPy arrays.
      overlap: Share of a token's chosen blocks that the token before lists, [2, L]:
        of the forecast, of the own query.
      misses: Blocks that a step fetches for a kv head, [2, L, sizes], with
        `SLOT_LISTS` lists of slots.
    """

    rows: int
    tokens: int
    sums: LayerSums
    overlap: np.ndarray
    misses: np.ndarray


def _replay(
    listed: Bool[np.ndarray, "2 K s M"], first: int, plan: MeasurePlan, forced: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(overlap [2], misses [2, sizes]) of the last tokens of a row and layer."""
    block_size, init, local = forced
    own = (first + np.arange(listed.shape[2])) // block_size
    block = np.arange(listed.shape[3])
    chosen = listed & (block >= init) & (block < own[:, None] - local)
    kept = (chosen[:, :, 1:] & listed[:, :, :-1]).sum((1, 2, 3))
    overlap = kept / np.maximum(chosen[:, :, 1:].sum((1, 2, 3)), 1)
    slots = [round(plan.budget * share) for share in SLOT_LISTS]
    warm = 1 + min(WARM_STEPS, listed.shape[2] // 4)
    misses = np.stack(
        [slot_misses(x, own, slots)[:, warm:].mean((0, 1)) for x in listed]
    )
    return overlap, misses


def _layer_weights(lm: LanguageModel, number: int) -> DecoderLayer:
    layers = lm.model.layers
    if isinstance(layers, nnx.List):
        return layers[number]
    return jax.tree.map(lambda x: x[number], layers)


class PassedLayer(NamedTuple):
    """A layer that a row has gone through.

    Attributes:
      block: The layer's weights, the Forecast head that it consumes, its number.
      hidden: Its input.
      before: What the forecast reads of the layer before; of layer 0, anything.
      rope_cos_sin: cos and sin of all tokens.
      sums, listed: As `measure_layer` gives them.
    """

    block: LayerBlock
    hidden: Float[Array, "1 T D"]
    before: Float[Array, "1 T D"]
    rope_cos_sin: RopeCosSin
    sums: LayerSums
    listed: Bool[Array, "2 K s M"]


def walk_layers(
    lm: LanguageModel, row: Sequence[int] | np.ndarray, plan: MeasurePlan
) -> Iterator[PassedLayer]:
    """Runs a row of tokens through the model, layer by layer, and measures each."""
    positions = jnp.arange(len(row))[None]
    cos_sin = rope_cos_sin_at(model_rope(lm.config, len(row)), positions)
    ids = jnp.asarray(np.asarray(row, np.int32))[None]
    hidden = before = embed(lm.model, ids, lm.model.embedding[...].dtype)
    for number in range(lm.config.num_layers):
        block = LayerBlock(
            _layer_weights(lm, number),
            lm.selector.next_query_weights(lm.model, number),
            jnp.int32(number),
        )
        out, normed, sums, listed = measure_layer(
            block, hidden, before, cos_sin, lm.settings, plan
        )
        yield PassedLayer(block, hidden, before, cos_sin, sums, listed)
        hidden, before = out, normed


def measure(
    lm: LanguageModel,
    rows: Sequence[np.ndarray],
    plan: MeasurePlan,
    *,
    on_layer: Callable[[], None] = lambda: None,
) -> Measured:
    """Runs rows of equal length through the model and measures every layer.

    Args:
      lm: Loaded with a selector that needs Forecast heads.
      rows: Token ids, at least one row.
      plan: Of `make_plan` for their length.
      on_layer: Called after each layer of each row (progress).

    Raises:
      ConfigError: If the model's selector has no Forecast.
    """
    selector = lm.selector
    require(
        selector.needs_forecast, "attention", selector.name, "one by Forecast heads"
    )
    layers, sparse = lm.config.num_layers, lm.sparse
    forced = (sparse.block_size, sparse.init_blocks, sparse.local_blocks)
    totals: list[Any] = [None] * layers
    overlap = np.zeros((2, layers))
    misses = np.zeros((2, layers, len(SLOT_LISTS)))
    for row in rows:
        first = len(row) - plan.steps
        for number, passed in enumerate(walk_layers(lm, row, plan)):
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), passed.sums)
            held = totals[number]
            totals[number] = sums if held is None else jax.tree.map(np.add, held, sums)
            kept, fetched = _replay(np.asarray(passed.listed), first, plan, forced)
            overlap[:, number] += kept / len(rows)
            misses[:, number] += fetched / len(rows)
            on_layer()
    stacked = jax.tree.map(lambda *x: np.stack(x), *totals)
    return Measured(len(rows), len(rows[0]), stacked, overlap, misses)
