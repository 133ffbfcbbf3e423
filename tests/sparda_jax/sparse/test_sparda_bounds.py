"""Forecasts scored by extreme keys, against NumPy and with a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import CONFIG, KINDS, SPARSE

import sparda_jax as sj
from sparda_jax.models.weights import from_query_heads
from sparda_jax.sparse.selectors.infllm_v2_bounds import InfLLMV2Bounds
from sparda_jax.sparse.selectors.sparda_bounds import SparDABounds


def _bounds(layer, queries, page):
    """By the definition: [B, K, G, T, pages], the bound of each query's products."""
    kv_heads = layer.k.shape[2]
    batch, length, heads, dim = queries.shape
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    found = []
    for first in range(0, layer.length, page):
        part = layer.k[:, first : first + page].astype(float)
        least, most = part.min(1), part.max(1)  # B K H
        pair = (grouped * x[:, None, :, None] for x in (least, most))
        found.append(np.maximum(*pair).sum(-1))
    return np.stack(np.moveaxis(found, (3, 4), (2, 3)), axis=-1)


def _scores(layer, queries, page):
    """[B, K, T, M]: one query's bounds, or the sum of several queries' softmax."""
    bounds = _bounds(layer, queries, page)
    if bounds.shape[2] > 1:
        pages = bounds.shape[-1]
        last = np.arange(1, pages + 1) * page - 1
        past = last < np.arange(layer.length)[:, None]
        logits = np.where(past, bounds * layer.k.shape[-1] ** -0.5, -np.inf)
        peak = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(peak), peak, 0))
        total = weights.sum(-1, keepdims=True)
        bounds = weights / np.where(total > 0, total, 1)
    scores = bounds.sum(2)
    short = -scores.shape[-1] % (SPARSE.block_size // page)
    padding = [(0, 0)] * 3 + [(0, short)]
    scores = np.pad(scores, padding, constant_values=-np.inf)
    return scores.reshape(*scores.shape[:3], layer.blocks, -1).max(-1)


@pytest.mark.parametrize(
    ("page", "queries"),
    [
        (None, 2),
        pytest.param(16, 2, marks=[pytest.mark.slow, pytest.mark.long]),
        (32, 1),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_the_definition_s(kind, page, queries):
    """By one query a kv head and by several, in prefill and in decode.

    A prompt's row is scored as decode scores it: without the keys behind it, which the
    index has already.
    """
    layer = cases.draw_layer(kind, length=390)
    selector, own, blocks = SparDABounds(page), InfLLMV2Bounds(page), 8
    assert own.indices(CONFIG) == selector.indices(CONFIG)
    index = cases.make_index(selector, layer, [layer.length], blocks)
    forecast = layer.q[:, :, :: 2 // queries]
    want = _scores(layer, forecast, page or SPARSE.block_size)
    for where, decoding in ((slice(300, None), False), (slice(-1, None), True)):
        tile = cases.tile_of(
            layer,
            index,
            where,
            blocks,
            forecast=jnp.asarray(forecast[:, where]),
            decoding=decoding,
        )
        got = cases.scored(selector, dataclasses.replace(tile, q=None))
        if queries == 2:  # Then own queries are scored alike.
            again = cases.scored(own, tile)
            np.testing.assert_array_equal(got, again)
        # Logits of thousands, in float32, are what a softmax is taken of.
        near = {"rtol": 1e-4, "atol": 2e-3} if queries == 1 else {"rtol": 5e-3}
        np.testing.assert_allclose(
            got[..., : layer.blocks], want[:, :, where], **{"atol": 1e-6, **near}
        )
        assert np.all(got[..., layer.blocks :] == -np.inf)
        lists = cases.listed(selector, tile)
        positions = np.arange(layer.length)[where]
        # A float32 sum may order near ties otherwise.
        assert cases.listed_sets(lists) == cases.best_sets(got, positions, SPARSE)


def test_a_page_divides_a_block():
    with pytest.raises(sj.ConfigError, match=r"page=48 .*a divisor of 64"):
        SparDABounds(48).scores_per_block(SPARSE)
    small = sj.SparseConfig(block_size=8, kernel_size=4, kernel_stride=2)
    assert SparDABounds().scores_per_block(small) == 2
    with pytest.raises(sj.ConfigError, match=r"page=0 .*at least 1"):
        SparDABounds(0)


@pytest.mark.slow
@pytest.mark.long  # as `sparda`: `test_offload`
def test_offloaded_it_looks_ahead_and_gives_the_same(token_ids):
    """With a query for each query head; with one a group in `test_offload`."""
    lm = sj.load("tiny", sparse=SPARSE, storage="stacked")
    model = lm.model.with_forecast(from_query_heads(lm.model, 4))
    lm = dataclasses.replace(lm, model=model, config=model.config)
    lm = sj.with_attention(lm, "sparda_bounds")
    prompts = [token_ids(600), token_ids(70)]
    expected = sj.generate(lm, prompts, max_new_tokens=70, ignore_eos=True)
    # A decode step chooses what a prompt's row chooses.
    whole = sj.forward(lm, [*prompts[0], *expected.tokens[0][:-1]])
    greedy = np.argmax(np.asarray(whole)[len(prompts[0]) - 1 :], axis=1)
    assert greedy.tolist() == expected.tokens[0]
    offloaded = sj.with_attention(
        lm, "sparda_bounds", cache=sj.CacheConfig(kind="offload")
    )
    out = sj.generate(offloaded, prompts, max_new_tokens=70, ignore_eos=True)
    assert out.tokens == expected.tokens
    stats = out.stats.offload
    assert stats is not None and stats.lookahead and stats.hits > 0
