"""The `random` selector: seeded, and the same however a prompt is cut."""

import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import SPARSE, check_everywhere

from sparda_jax.models.presets import get_preset
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors.random import Random


@pytest.mark.slow
@pytest.mark.long  # what chooses by places alone: `window` in `test_every_selector`
def test_random_runs_everywhere():
    check_everywhere("random")


def test_a_seed_draws_the_same_blocks():
    tile = SelectionTile(
        q=None,
        forecast=None,
        positions=jnp.arange(2000, 2004)[None],
        length=jnp.full((1,), 2004),
        index={},
        num_blocks=40,
        decoding=False,
    )
    config = get_preset("tiny").model
    lists = [Random(seed).select(tile, config, SPARSE) for seed in (0, 0, 1)]
    first, again, other = (set(np.asarray(blocks).ravel().tolist()) for blocks in lists)
    assert first == again != other


def _drawn(seed, head, position, blocks):
    """The hash by its definition, in Python's integers."""
    found = []
    for block in range(blocks):
        x = block * 0x9E3779B1 % 2**32
        for word in (position, head, seed):
            x = (x ^ (word + 0x7F4A7C15) % 2**32) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            x ^= x >> 16
        found.append(np.float32(x))
    return np.array(found)


def test_lists_are_the_definition_s_and_even():
    layer = cases.draw_layer("random", batch=1)
    selector, positions = Random(3), np.arange(layer.length)
    tile = cases.tile_of(layer, {}, slice(None), 16)
    lists = cases.listed_sets(cases.listed(selector, tile))
    scores = np.array(
        [[[_drawn(3, head, p, 16) for p in positions.tolist()] for head in range(2)]]
    )
    assert lists == cases.best_sets(scores, positions, SPARSE)
    # In the last block's rows each of the blocks that are not forced comes as often.
    whole = [found for found in lists if max(found) == 10]
    free = np.array([[block in found for found in whole] for block in range(1, 8)])
    assert len(whole) == 2 * 60 and np.all(free.sum(0) == 2)
    assert np.all(np.abs(free.mean(1) - 2 / 7) < 4 * np.sqrt(2 / 7 * 5 / 7 / 120))
