"""A tiny random model and jitted ways to run it, shared by the inference tests."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.cache.resident import KVCache, init_cache
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.prefill import prefill
from sparda_jax.models.decoder import Decoder, logits
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.rope import model_rope
from sparda_jax.models.weights import build_decoder, from_query_heads, random_tensors
from sparda_jax.sparse.selection import sorted_blocks
from sparda_jax.sparse.selectors import get_selector

CAPACITY = 1536
WIDTH = 512


class Rows(NamedTuple):
    """Logits [B, T, V], sorted block lists [L, B, K, T, P] and the cache."""

    logits: jax.Array
    blocks: jax.Array
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model with one way to attend, its calls jitted once."""

    model: Decoder
    settings: LayerSettings

    def empty(self, batch: int) -> KVCache:
        """An empty cache."""
        return init_cache(
            self.settings.config,
            self.settings.sparse,
            self.settings.indices,
            batch=batch,
            capacity=CAPACITY,
            dtype=jnp.float32,
            storage=self.model.storage,
        )

    def prefill(self, cache, rows, start, *, tile_size=128, width=WIDTH) -> Rows:
        """Appends ragged rows of ids at `start`."""
        tokens = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        count = jnp.asarray([len(row) for row in rows], jnp.int32)
        start = jnp.asarray(start, jnp.int32)
        return _prefill(
            self.model,
            cache,
            jnp.asarray(tokens),
            start,
            count,
            self.settings,
            tile_size,
        )

    def decode(self, cache, tokens, lengths) -> Rows:
        """Feeds one token to every row."""
        tokens = jnp.asarray(tokens, jnp.int32)
        lengths = jnp.asarray(lengths, jnp.int32)
        return _decode(self.model, cache, tokens, lengths, self.settings)


@functools.partial(jax.jit, static_argnames=("settings", "tile_size"))
def _prefill(model, cache, tokens, start, count, settings, tile_size):
    rope = model_rope(settings.config, CAPACITY)
    carry = prefill(
        model,
        cache,
        tokens,
        start,
        count,
        rope,
        settings,
        tile_size=tile_size,
        capture=True,
    )
    scores = jax.vmap(lambda h: logits(model, h))(carry.hidden)
    return Rows(scores, sorted_blocks(carry.blocks), carry.cache)


@functools.partial(jax.jit, static_argnames="settings")
def _decode(model, cache, tokens, lengths, settings):
    rope = model_rope(settings.config, CAPACITY)
    active = jnp.ones(tokens.shape, bool)
    carry = decode_step(
        model, cache, tokens, lengths, active, rope, settings, capture=True
    )
    scores = logits(model, carry.hidden[:, 0])[:, None]
    return Rows(scores, sorted_blocks(carry.blocks), carry.cache)


@functools.cache
def _decoder(nosa: bool, storage: str) -> Decoder:
    config = _config(nosa)
    tensors = random_tensors(config, seed=1, scale=0.15)
    model = build_decoder(config, tensors, dtype=jnp.float32, storage=storage)
    model.set_forecast(from_query_heads(model))
    return model


def _config(nosa: bool) -> ModelConfig:
    preset = PRESETS["tiny-nosa" if nosa else "tiny"].model
    return dataclasses.replace(preset, num_layers=2)


@pytest.fixture(scope="session")
def runner():
    """`runner(attention, nosa=…, storage=…, **sparse)` makes a `Runner`."""

    def make(attention, *, nosa=None, storage="stacked", **changes) -> Runner:
        nosa = attention == "nosa" if nosa is None else nosa
        sparse = SparseConfig(local_blocks=2, block_budget=6, query_blocks=2)
        sparse = dataclasses.replace(sparse, **changes)
        settings = LayerSettings(_config(nosa), sparse, get_selector(attention))
        return Runner(_decoder(nosa, storage), settings)

    return make
