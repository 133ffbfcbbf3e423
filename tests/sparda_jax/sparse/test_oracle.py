"""The oracle's masses against NumPy; and that no selector captures more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import CONFIG, KINDS, SPARSE

from sparda_jax.sparse.selectors import get_selector, selector_names
from sparda_jax.sparse.selectors.oracle import _blocks_at_a_time

BLOCKS, WHERE = 16, slice(600, None)


def _captured(masses, lists):
    """Mass that each row's list captures [B, K, T]."""
    lists = np.asarray(lists)
    taken = np.take_along_axis(masses, np.maximum(lists, 0), axis=-1)
    return np.where(lists >= 0, taken, 0).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_masses_are_the_definition_s(kind):
    layer, oracle = cases.draw_layer(kind), get_selector("oracle")
    index = cases.make_index(oracle, layer, [300, 1, layer.length - 301], BLOCKS)
    tile = cases.tile_of(layer, index, WHERE, BLOCKS)
    masses = layer.masses()[:, :, WHERE]
    got = np.asarray(oracle.score(tile, CONFIG, SPARSE, None))
    np.testing.assert_allclose(got[..., : layer.blocks], masses, atol=2e-5)
    np.testing.assert_allclose(got.sum(-1), CONFIG.group_size, rtol=1e-5)
    positions = np.arange(layer.length)[WHERE]
    lists = oracle.select(tile, CONFIG, SPARSE)
    assert cases.listed_sets(lists) == cases.best_sets(got, positions, SPARSE)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_behind_all_queries_hold_nothing(kind):
    """They are not read: a larger capacity gives the same masses, bit for bit."""
    layer, oracle = cases.draw_layer(kind), get_selector("oracle")

    def masses(blocks):
        index = cases.make_index(oracle, layer, [layer.length], blocks)
        tile = cases.tile_of(layer, index, WHERE, blocks)
        return np.asarray(oracle.score(tile, CONFIG, SPARSE, None))

    small, large = masses(BLOCKS), masses(4 * BLOCKS)
    np.testing.assert_array_equal(large[..., :BLOCKS], small)
    assert np.all(large[..., BLOCKS:] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_tile_walks_over_keys_in_steps(kind):
    layer, oracle = cases.draw_layer(kind), get_selector("oracle")
    blocks, where = 32, slice(300, None)
    steps = len(range(layer.length)[where])
    assert _blocks_at_a_time(blocks, steps, SPARSE.block_size) == 4
    index = cases.make_index(oracle, layer, [layer.length], blocks)
    tile = cases.tile_of(layer, index, where, blocks)
    got = np.asarray(oracle.score(tile, CONFIG, SPARSE, None))
    masses = layer.masses()[:, :, where]
    np.testing.assert_allclose(got[..., : layer.blocks], masses, atol=2e-5)
    assert np.all(got[..., layer.blocks :] == 0)


@pytest.mark.parametrize("steps", [2, 256, 257, 1024, 4096, 30720])
@pytest.mark.parametrize("blocks", [5, 12, 72, 96, 288, 576, 2304])
def test_steps_of_the_walk_have_bounds(blocks, steps):
    size = _blocks_at_a_time(blocks, steps, 64)
    assert blocks % size == 0
    assert size <= 16 or size * 64 <= 6 * blocks
    assert size <= 4 or steps <= 256 or size * 64 * steps <= 2**21
    assert _blocks_at_a_time(blocks, 1, 64) == blocks
    assert _blocks_at_a_time(576, 1024, 64) == 32


def test_masses_are_of_32_bits_where_64_are_allowed():
    layer, oracle = cases.draw_layer(KINDS[0]), get_selector("oracle")
    index = cases.make_index(oracle, layer, [layer.length], BLOCKS)
    tile = cases.tile_of(layer, index, WHERE, BLOCKS)
    with jax.enable_x64(True):
        assert oracle.score(tile, CONFIG, SPARSE, None).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_selector_captures_more_than_the_oracle(kind, decoding):
    """In any row: of a step, and of a prompt's tile."""
    layer = cases.draw_layer(kind, seed=1)
    where = slice(-1, None) if decoding else WHERE
    masses = layer.masses()[:, :, where]
    steps, compared = masses.shape[2], 0
    best = None
    for name in ("oracle", *selector_names()):
        selector = get_selector(name)
        config = dataclasses.replace(CONFIG, key_bias=name == "nosa")
        index = cases.make_index(selector, layer, [layer.length], BLOCKS)
        forecast = layer.grouped()[:, where].mean(3) if selector.looks_ahead else None
        if selector.hands_on_scores:
            forecast = np.random.default_rng(2).random((2, steps, 2, BLOCKS))
        if forecast is not None:
            forecast = jnp.asarray(forecast, jnp.float32)
        tile = cases.tile_of(
            layer, index, where, BLOCKS, forecast=forecast, decoding=decoding
        )
        if selector.hands_on_scores and not decoding:
            tile = dataclasses.replace(tile, q=None)  # of the layer before
        lists = selector.select(tile, config, SPARSE)
        if lists is None:
            continue
        captured = _captured(masses, lists)
        best = captured if best is None else best
        assert np.all(best >= captured - 1e-5), name
        compared += 1
    assert compared > 8
