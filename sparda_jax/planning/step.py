"""The time of a decode step from a machine's rates: an estimate, no measurement.

A step moves its device bytes at the device's bandwidth, computes at its peak, and
fetches its misses at the rate of the fetch route. With look-ahead it takes as long as
the slowest of the three; without, the fetch comes on top. That is a bound. Beside it
every layer takes a time that hardly depends on anything: starts of kernels, and small
ones that neither fill the device nor its memory's bus. Where blocks are fetched, each
row adds a little to that, and a block that is decoded takes longer than its bytes.
These are recorded from whole steps; where they are not known, the bound stands alone.
How many listed blocks are not in a slot is an input: it depends on model and text.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ModelConfig
from sparda_jax.models.spec import (
    model_shapes,
    num_active_parameters,
    num_forecast_parameters,
)
from sparda_jax.planning.rates import Rates


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The time of one decode step, in seconds.

    Attributes:
      memory: Device bytes over bandwidth, and what decoding adds.
      compute: FLOPs over peak; 0 where the peak is not known.
      fetch: Missed bytes over the route's rate; 0 for a resident cache.
      hidden: The part of `fetch` that can run beside the rest.
      overhead: What all layers take beside these; 0 where it is not known.
    """

    memory: float
    compute: float
    fetch: float
    hidden: float
    overhead: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step: the bound, and what layers take beside it."""
        return self.bound + self.overhead

    @property
    def bound(self) -> float:
        """The least time that the rates allow."""
        device = max(self.memory, self.compute)
        return max(device, self.hidden) + self.fetch - self.hidden

    @property
    def bound_by(self) -> str:
        """What the step waits for most."""
        costs = {
            "memory": self.memory,
            "compute": self.compute,
            "fetch": self.fetch,
        }
        return max(costs, key=lambda name: costs[name])


def _experts_in_use(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that a step reads, if all are chosen equally often."""
    if config.dense_mlp:
        return 0.0
    idle = 1 - config.experts_per_token / config.num_experts
    return config.num_experts * (1 - idle**batch)


# Passes over float32 scores of a group of queries, by a profile (docs/log-offload.md).
_SCORE_PASSES = 4


def _window_bytes(settings: LayerSettings, size: int, queries: int) -> int:
    """Bytes of a compressed key, in numbers of `size` bytes or in 8 bits.

    One query is scored in one pass over them. For a group of queries a product writes a
    score of each, and three reductions read those; from 8 bits windows are written in
    the model's type before, and read by the product.
    """
    dim = settings.config.head_dim
    scores = _SCORE_PASSES * 4 * queries if queries > 1 else 0
    if settings.sparse.compressed_keys == "int8" and "key_means" in settings.indices:
        widened = 2 * dim * size if queries > 1 else 0
        return dim + 4 + widened + scores
    return dim * size + scores


def step_time(
    settings: LayerSettings,
    cache: CacheConfig,
    rates: Rates,
    *,
    batch: int,
    capacity: int,
    context: int,
    dtype: DTypeLike,
    miss: float,
) -> StepTime:
    """The time of a decode step whose rows hold `context` tokens.

    Attention to slots in 8 bits takes as long as from 16: it widens what it need not
    read. A row's own block is always in its slot.

    Args:
      settings: How the request runs.
      cache: Where layer 0 lives.
      rates: The machine.
      batch: Sequences.
      capacity: Tokens of room in each.
      context: Tokens held by each.
      dtype: Type of weights and cache.
      miss: Share of listed blocks that no slot holds.
    """
    config, sparse, selector = settings.config, settings.sparse, settings.selector
    size, block = jnp.dtype(dtype).itemsize, sparse.block_size
    held = -(-context // block)
    room = capacity // block
    lists = selector.lists_blocks(room, sparse)
    attended = held
    if lists:
        width = min(held, selector.list_width(room, sparse))
        budgets = [min(width, budget) for budget in sparse.budgets]
        attended = sum(budgets) / len(budgets)
    heads = batch * config.num_kv_heads * config.num_layers
    block_bytes = block * 2 * config.head_dim * size

    table = math.prod(model_shapes(config)["embedding"])
    # A step reads a few rows of the embedding, and a device's part of the head.
    outside = table // settings.parts - table
    if not config.tie_embeddings:
        outside -= table
    if selector.needs_forecast:
        outside += num_forecast_parameters(config)
    read = num_active_parameters(config, _experts_in_use(config, batch)) + outside
    moved = read * size + heads * attended * block_bytes
    flops = 2 * (num_active_parameters(config) + outside) * batch
    per_key = 4 * config.group_size * config.head_dim
    flops += heads * attended * block * per_key
    if lists:
        windows = held * selector.scores_per_block(sparse)
        scored = selector.scored_heads(config, sparse, decoding=True)
        queries = scored // config.num_kv_heads
        if scored:
            moved += heads * windows * _window_bytes(settings, size, queries)
        flops += 2 * heads * windows * queries * config.head_dim

    fetch = hidden = decoding = planning = 0.0
    offload = settings.offload
    if (
        offload is not None
        and cache.slots(room, selector.list_width(room, sparse)) < room
    ):
        away = config.num_layers - (0 if cache.layer0 == "offload" else 1)
        blocks = miss * (attended - 1) * batch * config.num_kv_heads
        stored = offload.codec.bytes_per_block((block, 2, config.head_dim), dtype)
        missed = blocks * stored
        fetch = away * missed / rates.fetch
        # Fetched blocks are written and read as they are stored, then put in a slot.
        in_slot = stored if offload.codec.in_slots else block_bytes
        moved += away * blocks * (2 * stored + in_slot)
        planning = away * batch * rates.row
        if stored < in_slot:
            decoding = away * blocks * rates.decode
        if offload.lookahead:
            # Nobody looks ahead for layer 0.
            hidden = (config.num_layers - 1) * missed / rates.fetch
    return StepTime(
        memory=moved / rates.memory + decoding,
        compute=0.0 if rates.peak is None else flops / rates.peak,
        fetch=fetch,
        hidden=hidden,
        overhead=config.num_layers * rates.layer + planning,
    )
