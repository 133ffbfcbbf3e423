"""How many bytes a request needs, by part, before anything is allocated.

What stays from one call to the next (weights, caches, generation state) is counted on
the abstract arrays that the code itself makes, so it is exact and cannot drift. What a
call needs for itself is estimated from the shapes that live at its widest point; the
estimate is that of the XLA forms in the model's own type, compared in the tests with
what XLA's buffer assignment says. Pallas kernels need less.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.block_scores import api as block_scores
from pallas_kernels.block_sparse_attention import api as block_sparse_attention
from pallas_kernels.paged_decode_attention import api as paged_decode_attention
from sparda_jax.cache.evict import kept_blocks
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ModelConfig
from sparda_jax.inference.generate import GenerateState, new_state
from sparda_jax.inference.prefill import padded_length
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.decoder import Decoder, Storage
from sparda_jax.models.experts import copied_bytes
from sparda_jax.models.weights import abstract_decoder

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one request.

    Attributes:
      kind: Where the KV lives.
      batch, capacity: Sequences, and tokens that each can hold.
      weights: The model without Forecast heads.
      forecast_heads: The heads, where the model has them.
      kv: KV of the resident layers: all, or layer 0, or none; what a cache that evicts
        keeps of it.
      slots: Device slots of the offloaded layers.
      slot_tables: What is in them.
      compressed_keys: Of all layers, for all blocks.
      key_bias: NOSA's bias a token and its window means.
      staging: Where fetched blocks are staged.
      generation: Tokens, lengths, tokens seen, counters.
      layer_copy: One layer's weights, which a scan takes out of the stack.
      kv_scratch: One layer's whole KV, while a layer prefills that is offloaded or
        evicts: of all rows,
        or of one where they are prefilled one after another (`Shapes.by_row`), as for
        the next two.
      prompt_states: Hidden states, forecasts and rotations of the prompt.
      tile_scratch: What one prefill tile needs at its widest point.
      decode_scratch: What one decode step needs.
      host: The host store.
    """

    kind: str
    batch: int
    capacity: int
    weights: int
    forecast_heads: int
    kv: int
    slots: int
    slot_tables: int
    compressed_keys: int
    key_bias: int
    staging: int
    generation: int
    layer_copy: int
    kv_scratch: int
    prompt_states: int
    tile_scratch: int
    decode_scratch: int
    host: int

    @property
    def persistent(self) -> int:
        """Device bytes that stay from call to call."""
        return sum(
            (
                self.weights,
                self.forecast_heads,
                self.kv,
                self.slots,
                self.slot_tables,
                self.compressed_keys,
                self.key_bias,
                self.staging,
                self.generation,
            )
        )

    @property
    def prefill_peak(self) -> int:
        """Most device bytes while the prompt runs."""
        scratch = self.kv_scratch + self.prompt_states + self.tile_scratch
        return self.persistent + self.layer_copy + scratch

    @property
    def decode_peak(self) -> int:
        """Most device bytes while tokens are decoded."""
        return self.persistent + self.layer_copy + self.decode_scratch

    @property
    def device(self) -> int:
        """Most device bytes at any time."""
        return max(self.prefill_peak, self.decode_peak)

    def parts(self) -> list[tuple[str, int]]:
        """Names and bytes of the device's parts at its widest point; none is 0."""
        prefill = self.prefill_peak >= self.decode_peak
        kv = "KV of layer 0" if self.kind == "offload" else "KV"
        named = [
            ("weights", self.weights),
            ("Forecast heads", self.forecast_heads),
            (kv, self.kv),
            ("KV slots", self.slots),
            ("slot tables", self.slot_tables),
            ("compressed keys", self.compressed_keys),
            ("key bias", self.key_bias),
            ("staging", self.staging),
            ("generation state", self.generation),
            ("copy of one layer's weights", self.layer_copy),
        ]
        if prefill:
            named += [
                ("prefill: one layer's KV", self.kv_scratch),
                ("prefill: prompt states", self.prompt_states),
                ("prefill: tile scratch", self.tile_scratch),
            ]
        else:
            named += [("decode scratch", self.decode_scratch)]
        return [(name, size) for name, size in named if size]


def abstract_state(
    model: Decoder,
    settings: LayerSettings,
    cache: CacheConfig,
    batch: int,
    shapes: Shapes,
) -> tuple[GenerateState, HostStore | None]:
    """A generation state of shapes, and its host store, which the state then lacks.

    Args:
      model: A decoder, of values or of shapes.
      settings: How to attend.
      cache: Where the KV lives.
      batch: B.
      shapes: Sizes.
    """
    found: list[HostStore] = []

    def make(model: Decoder) -> GenerateState:
        state = new_state(model, settings, batch, shapes, cache, abstract=True)
        if not isinstance(state.cache, OffloadCache):
            return state
        # The store has no arrays here, and must not leave the traced function.
        found.append(state.cache.store)
        kept = state.cache._replace(store=None)  # pyrefly: ignore[bad-argument-type]
        return state._replace(cache=kept)

    state = jax.eval_shape(make, model)
    return state, found[0] if found else None


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays of a tree, of values or of shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)


@dataclasses.dataclass(frozen=True)
class _State:
    """Bytes of the generation state by part."""

    kv: int
    slots: int
    slot_tables: int
    compressed_keys: int
    key_bias: int
    staging: int
    generation: int
    host: int


@functools.lru_cache(256)
def _state_bytes(
    settings: LayerSettings, cache: CacheConfig, batch: int, shapes: Shapes, dtype: str
) -> _State:
    # Stacked and per-layer storage hold the same bytes; fewer arrays are fewer to
    # trace.
    model = _abstract_stack(settings.config, dtype)
    state, store = abstract_state(model, settings, cache, batch, shapes)
    kv = slots = tables = staging = ()
    if isinstance(state.cache, OffloadCache):
        first = state.cache.first
        layers = (*state.cache.layers, *(() if first is None else (first,)))
        kv = () if first is None else (first.kv,)
        slots = tuple(
            (layer.slots, layer.scales, layer.tail) for layer in state.cache.layers
        )
        tables = tuple(layer.table for layer in state.cache.layers)
        staging = state.cache.staging
    else:
        layers = state.cache.layers
        kv = tuple(layer.kv for layer in layers)
        tables = tuple(layer.page_table for layer in layers)
    rest = [part for part in state if part is not state.cache]
    return _State(
        kv=tree_bytes(kv),
        slots=tree_bytes(slots),
        slot_tables=tree_bytes(tables),
        compressed_keys=tree_bytes([layer.index for layer in layers]),
        key_bias=tree_bytes([layer.key_bias for layer in layers]),
        staging=tree_bytes(staging),
        generation=tree_bytes(rest),
        host=tree_bytes(store),
    )


def _affine(
    settings: LayerSettings, cache: CacheConfig, batch: int, shapes: Shapes, dtype: str
) -> _State:
    """`_state_bytes`, traced for one and two sequences only: every array has an axis
    of sequences or does not know how many there are."""
    one = dataclasses.astuple(_state_bytes(settings, cache, 1, shapes, dtype))
    two = dataclasses.astuple(_state_bytes(settings, cache, 2, shapes, dtype))
    return _State(*(a + (batch - 1) * (b - a) for a, b in zip(one, two, strict=True)))


@functools.lru_cache(64)
def _abstract_stack(config: ModelConfig, dtype: str) -> Decoder:
    return abstract_decoder(config, dtype, storage="stacked", forecast=True)


@functools.lru_cache(64)
def _weight_bytes(config: ModelConfig, dtype: str) -> tuple[int, int, int]:
    """Bytes of the base model, of all Forecast heads, and of one layer."""
    model = _abstract_stack(config, dtype)
    heads, layers = tree_bytes(model.forecast), tree_bytes(model.layers)
    return tree_bytes(model) - heads, heads, layers // config.num_layers


def _vocabulary_elsewhere(settings: LayerSettings, size: int) -> int:
    """Bytes of embedding and head that the other devices of a mesh hold."""
    config = settings.config
    tables = 1 if config.tie_embeddings else 2
    whole = tables * config.vocab_size * config.hidden_size * size
    return whole - whole // settings.parts


def _tile_scratch(
    settings: LayerSettings, batch: int, shapes: Shapes, width: int, size: int
) -> int:
    """What a prefill tile needs at its widest point.

    Args:
      settings: How to attend.
      batch: B.
      shapes: Sizes.
      width: P.
      size: Bytes of a number of the model.
    """
    config, sparse = settings.config, settings.sparse
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    tile = shapes.tile
    if not sparse.mask_future_blocks:
        tile = shapes.prompt
    blocks = shapes.capacity // sparse.block_size
    windows = blocks * settings.selector.scores_held(sparse)
    lists = settings.selector.lists_blocks(blocks, sparse, decoding=False)
    rows = batch * tile
    hidden, q = rows * config.hidden_size * size, rows * heads * dim * size
    kv = 2 * rows * kv_heads * dim * size
    forecast = rows * settings.selector.ahead_bytes(config, blocks, size)

    attend = hidden + q
    attend += block_sparse_attention.scratch_bytes(
        batch=batch,
        tokens=tile,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        block=sparse.block_size,
        blocks=blocks,
        listed=width if lists else None,
        itemsize=size,
    )

    choose = 0
    if lists:
        choose = hidden + q + kv + forecast
        choose += _choice_scratch(settings, batch, tile, windows, blocks, size)

    mlp = _mlp_scratch(config, rows, size)
    room = shapes.capacity
    end = batch * settings.selector.prompt_end_bytes(config, sparse, room)
    return max(attend, choose, mlp, end)


def _mlp_scratch(config: ModelConfig, rows: int, size: int) -> int:
    """The MLP: its input and output, gate and up, and their product.

    With experts the inputs and outputs of every pick, and where they are fewer than the
    experts a copy of the experts that are gathered, else on this machine's GPU what
    its product may copy.
    """
    hidden, ffn = config.hidden_size, config.ffn_size
    if config.dense_mlp:
        return rows * (2 * hidden + 3 * ffn) * size
    picks = rows * config.experts_per_token
    needed = 2 * rows * hidden + 3 * rows * config.shared_ffn_size
    if picks < config.num_experts:
        return (needed + picks * (3 * hidden * ffn + 3 * ffn + hidden)) * size
    copied = copied_bytes(config.num_experts, picks, hidden * size)
    return (needed + picks * (2 * hidden + 3 * ffn)) * size + copied


def _choice_scratch(
    settings: LayerSettings, batch: int, tile: int, windows: int, blocks: int, size: int
) -> int:
    """What choosing a prefill tile's blocks needs beside its queries.

    Args:
      settings: How to attend.
      batch: B.
      tile: T.
      windows: W.
      blocks: M.
      size: Bytes of a number of the model.
    """
    config, selector = settings.config, settings.selector
    heads = selector.scored_heads(config, settings.sparse, decoding=False)
    pooled = batch * tile * config.num_kv_heads * blocks * 4
    if selector.scores_all_windows:
        # Float32 scores of all windows, the masked ones beside them.
        return 2 * batch * tile * heads * windows * 4 + pooled
    if not heads:
        return 2 * pooled
    return block_scores.scratch_bytes(
        batch=batch,
        tokens=tile,
        heads=heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        windows=windows,
        blocks=blocks,
        per_block=settings.sparse.windows_per_block,
        itemsize=size,
    )


def _decode_scratch(
    settings: LayerSettings,
    batch: int,
    shapes: Shapes,
    width: int,
    size: int,
    staging_area: int,
) -> int:
    """What the layers of one decode step need."""
    config, sparse = settings.config, settings.sparse
    block, dim = sparse.block_size, config.head_dim
    blocks = shapes.capacity // block
    lists = settings.selector.lists_blocks(blocks, sparse)
    offload = settings.offload
    scales = ()
    if offload is not None:
        _, *scales = offload.codec.slot_shapes((block, 2, dim), jnp.float32)
    attend = paged_decode_attention.scratch_bytes(
        batch=batch,
        kv_heads=config.num_kv_heads,
        head_dim=dim,
        block=block,
        capacity=blocks,
        listed=width if lists else None,
        itemsize=size,
        scales=scales[0].size if scales else 0,
    )
    per_token = settings.selector.scored_heads(config, sparse, decoding=True)
    choose = (
        2 * batch * per_token * blocks * settings.selector.scores_per_block(sparse) * 4
        if lists
        else 0
    )
    mlp = _mlp_scratch(config, batch, size)
    ahead = 0
    if offload is not None and offload.lookahead and lists:
        ahead = staging_area
    return ahead + max(attend, choose, mlp)


def _sampling_scratch(settings: LayerSettings, batch: int) -> int:
    """What sampling a token of every row needs, where a row has top-p or min-p.

    A device has float32 logits of its part of the vocabulary, as the head gives them
    and by the temperature. Of all devices' it has four arrays: gathered, sorted, their
    probabilities and the sums of these.
    """
    vocab = settings.config.vocab_size
    return 4 * batch * (4 * vocab + 2 * vocab // settings.parts)


def memory_plan(
    settings: LayerSettings,
    cache: CacheConfig,
    *,
    batch: int,
    shapes: Shapes,
    dtype: DTypeLike,
    storage: Storage = "per_layer",
    forecast: bool | None = None,
) -> MemoryPlan:
    """The bytes of a request.

    Args:
      settings: Model, block selection, how to attend, and how an offloaded cache is
        decoded; without the last the cache is resident.
      cache: Slots and where layer 0 lives.
      batch: Sequences.
      shapes: Bucketed sizes, of `plan_shapes`.
      dtype: Type of weights and cache.
      storage: How the layers are stored.
      forecast: Whether the model holds Forecast heads; None: where they are needed.

    Raises:
      ConfigError: If the slots cannot hold a block list.
    """
    config, sparse = settings.config, settings.sparse
    name = jnp.dtype(dtype).name
    size = jnp.dtype(dtype).itemsize
    state = _affine(settings, cache, batch, shapes, name)
    base, heads, layer = _weight_bytes(config, name)
    base -= _vocabulary_elsewhere(settings, size)
    if forecast is None:
        forecast = settings.selector.needs_forecast
    blocks = shapes.capacity // sparse.block_size
    width = settings.selector.list_width(blocks, sparse)
    block_bytes = sparse.block_size * 2 * config.head_dim * size
    area = batch * config.num_kv_heads * width * block_bytes
    if settings.offload is not None:
        shape = (sparse.block_size, 2, config.head_dim)
        stored = settings.offload.codec.bytes_per_block(shape, name)
        area = batch * config.num_kv_heads * width * stored
        if cache.slots(blocks, width) == blocks:
            area = 0  # nothing is ever fetched
    staging, offload = state.staging, settings.offload
    if offload is not None and not offload.route.reuses_staging:
        # The kernels and NumPy bring their own: what is staged, and what is in flight.
        staging = area * (1 + offload.layers_ahead * offload.lookahead)
    padded = padded_length(shapes.prompt, shapes.tile)
    together = shapes.prefill_rows(batch)
    rows = together * padded
    ahead = settings.selector.ahead_bytes(config, blocks, size)
    states = rows * (config.hidden_size * size + ahead)
    rotation = rows * config.head_dim * 4
    copy = 0
    if storage == "stacked":
        needed = settings.selector.needs_forecast
        copy = layer + (heads // config.num_layers if needed else 0)
    scratch = 0
    evicts = kept_blocks(settings, shapes.capacity, shapes.new) is not None
    if offload is not None or evicts:
        scratch = together * config.num_kv_heads * blocks * block_bytes
    kind = "evict" if settings.evict else "resident"
    return MemoryPlan(
        kind=kind if offload is None else "offload",
        batch=batch,
        capacity=shapes.capacity,
        weights=base,
        forecast_heads=heads if forecast else 0,
        layer_copy=copy,
        kv_scratch=scratch,
        prompt_states=states + rotation,
        tile_scratch=_tile_scratch(settings, together, shapes, width, size),
        # No copy of a layer is held any more when a token is drawn.
        decode_scratch=max(
            _decode_scratch(settings, batch, shapes, width, size, area),
            _sampling_scratch(settings, batch) - copy,
        ),
        **vars(dataclasses.replace(state, staging=staging)),
    )
