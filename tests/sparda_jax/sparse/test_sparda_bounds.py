"""Forecasts scored by extreme keys, against NumPy and with a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import CONFIG, KINDS, SPARSE

import sparda_jax as sj
from sparda_jax.sparse.selectors.sparda_bounds import SparDABounds


def _bounds(layer, forecast, page):
    """By the definition: [B, K, T, M], the best page's bound, summed over queries."""
    batch, length, kv_heads, dim = layer.k.shape
    size = SPARSE.block_size
    out = np.full((batch, kv_heads, forecast.shape[1], layer.blocks), -np.inf)
    queries = forecast.reshape(batch, -1, kv_heads, forecast.shape[2] // kv_heads, dim)
    for first in range(0, length, page):
        part = layer.k[:, first : first + page].astype(float)
        least, most = part.min(1), part.max(1)  # B K H
        pair = (queries * x[:, None, :, None] for x in (least, most))
        bound = np.moveaxis(np.maximum(*pair).sum((-1, -2)), 1, 2)
        block = first // size
        out[..., block] = np.maximum(out[..., block], bound)
    return out


@pytest.mark.parametrize(("page", "queries"), [(None, 2), (16, 2), (32, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_the_definition_s(kind, page, queries):
    """By one query a kv head and by several, in prefill and in decode."""
    layer = cases.draw_layer(kind, length=390)
    selector, blocks = SparDABounds(page), 8
    index = cases.make_index(selector, layer, [layer.length], blocks)
    forecast = layer.q[:, :, :: 2 // queries]
    want = _bounds(layer, forecast, page or SPARSE.block_size)
    for where, decoding in ((slice(300, None), False), (slice(-1, None), True)):
        tile = cases.tile_of(
            layer,
            index,
            where,
            blocks,
            forecast=jnp.asarray(forecast[:, where]),
            decoding=decoding,
        )
        tile = dataclasses.replace(tile, q=None)
        got = np.asarray(selector.score(tile, CONFIG, SPARSE, None))
        expected = want[:, :, where]
        np.testing.assert_allclose(
            got[..., : layer.blocks], expected, rtol=1e-4, atol=2e-3
        )
        assert np.all(got[..., layer.blocks :] == -np.inf)
        lists = selector.select(tile, CONFIG, SPARSE)
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
def test_offloaded_it_looks_ahead_and_gives_the_same(token_ids):
    lm = sj.load(
        "tiny",
        attention="sparda_bounds",
        forecast="from_query",
        sparse=SPARSE,
        storage="stacked",
    )
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
