"""A trace's lists on a benchmark's shape: other layers, rows, budgets and contexts.

What a list costs depends on how much of it is new from one token to the next, how soon
blocks come back (a cache of more slots than the budget), and how far neighbouring
tokens agree (the tiles of prefill). The mapping keeps these; which block it is that
is listed decides nothing. From a trace of L₀ layers and K₀ heads, whose lists have
S₀ scored blocks, to L layers, B rows, K heads and S scored blocks:

  layer      l takes layer ⌊l · L₀ / L⌋.
  lists      A list is ⌊S / S₀⌋ whole lists of the trace, in blocks of their own, and
             S mod S₀ blocks of one more (`_part_of`). Piece j of row b and head k is
             head (b + j + k) mod K₀.
  time       Every piece walks through the trace's tokens forwards, then backwards, and
             so on, from a place of its own: no jump makes a list new. Rows and heads
             are then not in step, as they are not in a real batch.
  blocks     The blocks that a stream ever lists keep their order and are spread evenly
             over those that may be scored (init ≤ block < own − local).

Forced blocks are the benchmark's own. Shares are therefore those of scored blocks:
`BlockTrace.miss_curve` takes sizes as slots per scored block. Kept, where S is
at least S₀ / 2 (tests): the share that is new within 10 %, misses of caches of 1 to 4
lists within 15 % or half a percent of a list, unions of 16 and 64 neighbours within
10 %.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.dispatch import Implementation
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.resident import KVCache
from sparda_jax.checks import ConfigError
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.inference.generate import GenerateState
from sparda_jax.planning.traces import BlockTrace
from sparda_jax.sparse.index import (
    IndexPart,
    IndexShape,
    IndexState,
    Indices,
    NewTokens,
)
from sparda_jax.sparse.selection import SelectionTile, force_blocks, top_blocks
from sparda_jax.sparse.selectors import Selector

TRACES = pathlib.Path(__file__).resolve().parent / "traces"
DEFAULT_TRACE = TRACES / "qwen2.5-coder-0.5b_30k_prose_infllm_v2.npz"
_GOLDEN = 0.6180339887498949
PART = "trace"


@dataclasses.dataclass(frozen=True, eq=False)
class TracedLists:
    """Scored blocks of every stream (layer, row, head), as places of a working set.

    Attributes:
      bits: Whether a token lists a place, packed, the least significant bit first:
        uint8 [L, B, K, tokens, ceil(places / 8)].
      places: Size of the working set of the widest stream.
      scored: Places that each token lists.
      source: What it was made from, for reports.
    """

    bits: UInt8[np.ndarray, "L B K tokens bytes"]
    places: int
    scored: int
    source: str

    @property
    def tokens(self) -> int:
        """Tokens after which the lists begin anew, without a jump if all were kept."""
        return self.bits.shape[3]

    @property
    def listed(self) -> Bool[np.ndarray, "L B K tokens places"]:
        """The lists, unpacked."""
        bits = np.unpackbits(self.bits, axis=-1, bitorder="little")
        return bits[..., : self.places].astype(bool)

    def blocks(self, available: int, first: int = 0) -> Int[np.ndarray, " places"]:
        """The block that each place is, of `available` ones from `first` on."""
        return first + np.arange(self.places) * available // self.places


def _walk(length: int, count: int, begin: int) -> Int[np.ndarray, " count"]:
    """Positions forwards, backwards and so on through `length` tokens."""
    period = max(1, 2 * (length - 1))
    at = (begin + np.arange(count)) % period
    return np.minimum(at, period - at)


def standing(lists: TracedLists) -> TracedLists:
    """Lists that stay what each stream's first one is: nothing new is ever listed."""
    bits = np.broadcast_to(lists.bits[:, :, :, :1], lists.bits.shape)
    return dataclasses.replace(lists, bits=np.ascontiguousarray(bits))


def _part_of(
    lists: Bool[np.ndarray, "streams T M"], size: int
) -> Bool[np.ndarray, "streams T M"]:
    """`size` blocks of every list.

    A core, as many blocks drawn at random as are never more than `size` of a list, is
    kept whenever it is listed: what comes and goes in it is a fair sample. The rest of
    the list are blocks that stay while they are listed; for one that leaves comes the
    one that was here last. (Such a rest alone would hold the steadiest blocks only.)
    """
    streams, tokens, blocks = lists.shape
    random = np.random.default_rng(0)
    core = np.zeros((streams, blocks), bool)
    for stream in range(streams):
        drawn = random.permutation(blocks)
        most = np.cumsum(lists[stream][:, drawn], axis=1).max(0)
        core[stream, drawn[most <= size]] = True
    rank, rounds = random.permutation(blocks), blocks * (tokens + 2)
    kept = np.zeros_like(lists)
    last, now = np.full((streams, blocks), -1), np.zeros((streams, blocks), bool)
    for token in range(tokens):
        here = lists[:, token]
        order = (last + 1) * blocks + rank + now * rounds + core * 2 * rounds
        order = np.where(here, order, -1)
        best = np.argpartition(-order, size - 1, axis=1)[:, :size]
        now = np.zeros((streams, blocks), bool)
        np.put_along_axis(now, best, True, axis=1)
        kept[:, token] = now
        last[now] = token
    return kept


def map_trace(
    trace: BlockTrace,
    *,
    layers: int,
    rows: int,
    kv_heads: int,
    scored: int,
    tokens: int | None = None,
) -> TracedLists:
    """A trace's lists for other layers, rows, heads and budgets; see the module.

    Args:
      trace: The trace.
      layers, rows, kv_heads: L, B and K of the benchmark.
      scored: Blocks of a list that are not forced.
      tokens: Lists of each stream; None makes as many as lead back to the beginning
        without a jump.

    Raises:
      ConfigError: If nothing is scored.
    """
    if scored < 1:
        raise ConfigError(
            f"scored={scored} is not allowed: the budget must have room for blocks "
            "beside the forced ones"
        )
    chosen = trace.chosen
    layers_0, heads_0, length, _ = chosen.shape
    whole, rest = divmod(scored, trace.scored)
    sources = [chosen] * whole + ([_partial(trace, rest)] if rest else [])
    period = max(1, 2 * (length - 1))
    count = tokens or period

    def stream(layer: int, row: int, head: int) -> Bool[np.ndarray, "T places"]:
        of_layer, parts = layer * layers_0 // layers, []
        for piece, source in enumerate(sources):
            number = (row * kv_heads + head) * len(sources) + piece
            walk = _walk(length, count, round(number * _GOLDEN % 1 * period))
            part = source[of_layer, (row + head + piece) % heads_0, walk]
            parts.append(part[:, part.any(0)])
        return np.concatenate(parts, axis=1)

    names = list(np.ndindex(layers, rows, kv_heads))
    places = max(stream(*name).shape[1] for name in names)
    bits = np.zeros((layers, rows, kv_heads, count, -(-places // 8)), np.uint8)
    for name in names:
        # A narrower stream is spread over the whole working set.
        narrow, wide = stream(*name), np.zeros((count, places), bool)
        wide[:, np.arange(narrow.shape[1]) * places // narrow.shape[1]] = narrow
        bits[name] = np.packbits(wide, axis=-1, bitorder="little")
    source = f"{trace.model}, {trace.text}, {trace.attention}, {trace.tokens} tokens"
    return TracedLists(bits, places, scored, source)


def _partial(trace: BlockTrace, size: int) -> Bool[np.ndarray, "L K T M"]:
    chosen = trace.chosen
    return _part_of(chosen.reshape(-1, *chosen.shape[2:]), size).reshape(chosen.shape)


def check_room(lists: TracedLists, context: int, sparse: SparseConfig) -> int:
    """Blocks that may be scored at the end of a context.

    Raises:
      ConfigError: If they are fewer than the lists' working set.
    """
    own = context // sparse.block_size
    room = own - sparse.local_blocks - sparse.init_blocks
    if room < lists.places:
        needed = lists.places + sparse.local_blocks + sparse.init_blocks
        raise ConfigError(
            f"context={context} is not allowed with this trace: its lists of "
            f"{lists.scored} scored blocks go through {lists.places} blocks, which "
            f"takes a context of at least {needed * sparse.block_size} tokens"
        )
    return room


_State = UInt8[Array, "layers B K tokens bytes"]


@dataclasses.dataclass(frozen=True)
class TracedPart(IndexPart):
    """A layer's lists, beside what the selector keeps of its keys.

    `install` puts them in: an index part does not know which layer it is of.
    """

    tokens: int
    width: int

    def init(self, shape: IndexShape, sparse: SparseConfig) -> _State:
        """Empty lists."""
        del sparse
        lead = (shape.layers, shape.batch, shape.kv_heads)
        return jnp.zeros((*lead, self.tokens, self.width), jnp.uint8)

    def append(self, state: _State, new: NewTokens, sparse: SparseConfig) -> _State:
        """The same lists."""
        del new, sparse
        return state


def traced_selector(
    base: Selector, lists: TracedLists, *, context: int | None = None
) -> Selector:
    """A selector that scores as `base` does and chooses what a trace chose.

    What `base` scores is computed, and the choice among all blocks is made as ever: a
    step costs what it costs, but for reading the imposed lists. The cache's index must
    hold them (`install`).

    Args:
      base: The selector to run.
      lists: What to choose.
      context: For decode: tokens that every row holds at the beginning; the lists begin
        there, and their blocks stay where they are. None for prefill: a token takes the
        list of its position, and blocks move apart as the context grows.
    """

    @dataclasses.dataclass(frozen=True)
    class Traced(type(base)):
        name = base.name

        places: int = 0
        tokens: int = 0
        context: int | None = None

        def indices(self, config: ModelConfig) -> Indices:
            part = TracedPart(self.tokens, -(-self.places // 8))
            return {**super().indices(config), PART: part}

        def by_own_query(self) -> Selector:
            # Whoever has the last word chooses the same.
            own = super().by_own_query()
            if own is self:
                return self
            return traced_selector(own, lists, context=self.context)

        def score(
            self,
            tile: SelectionTile,
            config: ModelConfig,
            sparse: SparseConfig,
            implementation: Implementation | None,
        ) -> Float[Array, "B K T M"]:
            real = super().score(tile, config, sparse, implementation)
            own = tile.positions[0, 0] // sparse.block_size
            at = tile.positions
            if self.context is not None:
                own = jnp.int32(self.context // sparse.block_size)
                at = at - self.context
            imposed = traced_scores(
                tile.index[PART],
                self.places,
                at % self.tokens,
                own,
                real.shape[-1],
                sparse,
                steady=self.context is not None,
            )
            # What is real decides nothing, but the compiler cannot know that.
            return jnp.where(real > 1e30, real, imposed)

    given = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return Traced(**given, places=lists.places, tokens=lists.tokens, context=context)


def _sizes(blocks: int) -> Int[np.ndarray, " sizes"]:
    """1 and so on, each a quarter more than the one before, up to `blocks`."""
    sizes = np.unique(np.floor(1.25 ** np.arange(64)).astype(int))
    return sizes[sizes <= max(1, blocks)]


def traced_scores(
    bits: UInt8[Array, "B K tokens bytes"],
    places: int,
    at: Int[Array, "B T"],
    own: Int[Array, ""],
    num_blocks: int,
    sparse: SparseConfig,
    *,
    steady: bool,
) -> Float[Array, "B K T M"]:
    """Scores whose best are the listed blocks; no two blocks have the same.

    Args:
      bits: A layer's lists.
      places: Size of their working set.
      at: Which list each token takes.
      own: The block whose token sees as many blocks as places are spread over.
      num_blocks: M.
      sparse: Forced blocks, between which places are spread.
      steady: `own` is the same for all that follows; else places are spread over a
        rounded number of blocks, so that they rarely move.
    """
    available = jnp.maximum(own - sparse.local_blocks - sparse.init_blocks, 1)
    if not steady:
        sizes = jnp.asarray(_sizes(num_blocks), jnp.int32)
        # The largest size that is not more; a search would be a loop on the device.
        available = jnp.where(sizes <= available, sizes, 1).max()
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    offset = block - sparse.init_blocks
    place = jnp.clip(-(-offset * places // available), 0, places - 1)
    inside = (offset >= 0) & (offset < available)
    inside &= place * available // places == offset
    rows = jnp.take_along_axis(bits, at[:, None, :, None], axis=2)
    listed = (rows[..., place >> 3] >> (place & 7).astype(jnp.uint8)) & 1
    # Distinct, in an order that is no block order: ties cost a choice other work.
    spread = (block * 40503 % 65536).astype(jnp.float32) / 65536
    return jnp.where((listed > 0) & inside, 1 + spread, -1 - spread)


def _installed(index: IndexState, lists: TracedLists, first: int) -> IndexState:
    held = index[PART]
    piece = lists.bits[first : first + held.shape[0]]
    if piece.shape != held.shape:
        raise ConfigError(
            f"lists={lists.bits.shape} are not allowed: this cache takes {held.shape} "
            f"from layer {first} on"
        )
    return {**index, PART: jax.device_put(piece, held.sharding)}


def install(cache: KVCache | OffloadCache, lists: TracedLists) -> Any:
    """The cache with every layer's lists in its index (see `traced_selector`)."""
    first, whole = 0, []
    if isinstance(cache, OffloadCache) and cache.first is not None:
        index = _installed(cache.first.index, lists, 0)
        cache = cache._replace(first=cache.first._replace(index=index))
        first = 1
    for layer in cache.layers:
        index = _installed(layer.index, lists, first)
        whole.append(layer._replace(index=index))
        first += index[PART].shape[0]
    return cache._replace(layers=tuple(whole))


def begin_rows(state: GenerateState, context: int) -> GenerateState:
    """The state with rows that hold `context` tokens and have given none."""
    batch = state.lengths.shape[0]
    begun = {
        "lengths": np.full(batch, context, np.int32),
        "pending": np.arange(batch, dtype=np.int32) + 5,
        "generated": np.zeros(batch, np.int32),
        "done": np.zeros(batch, bool),
    }
    placed = {
        name: jax.device_put(value, getattr(state, name).sharding)
        for name, value in begun.items()
    }
    return state._replace(**placed)


def prefill_lists(
    lists: TracedLists,
    layer: int,
    *,
    tokens: int,
    sparse: SparseConfig,
    start: int = 0,
    tile: int = 1024,
) -> Int[np.ndarray, "B K tokens P"]:
    """Whole block lists of a layer's prefill, forced blocks among them.

    Args:
      lists: What a trace chose, mapped.
      layer: The layer.
      tokens: Query tokens.
      sparse: Forced blocks and budget.
      start: Position of the first one.
      tile: Tokens that are worked on at a time.

    Returns:
      Block indices, −1 where a list has no more.
    """
    blocks = -(-(start + tokens) // sparse.block_size)
    bits = jnp.asarray(lists.bits[layer])

    @jax.jit
    def of_tile(first: Int[Array, ""]) -> Int[Array, "B K tile P"]:
        at = first + jnp.arange(tile)[None].repeat(bits.shape[0], 0)
        own = (at // sparse.block_size)[:, None]
        scores = traced_scores(
            bits,
            lists.places,
            at % lists.tokens,
            own[0, 0, 0],
            blocks,
            sparse,
            steady=False,
        )
        forced = force_blocks(scores, own, sparse)
        return top_blocks(forced, own, at[:, -1] + 1, sparse)

    found = [np.asarray(of_tile(jnp.int32(start + i))) for i in range(0, tokens, tile)]
    return np.concatenate(found, axis=2)[:, :, :tokens]
