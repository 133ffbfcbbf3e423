"""Preferring held blocks: nothing changes without a margin; fetches fall with one."""

import numpy as np

from benchmarks.prefer_held import Lists, prefer_held
from sparda_jax.planning.traces import slot_misses

STREAMS, STEPS, BLOCKS, BUDGET = 3, 40, 24, 6


def _lists():
    """The first blocks of an order that drifts, as many as are asked for."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.4, (STREAMS, STEPS, BLOCKS)), axis=1)
    place = np.argsort(np.argsort(-walk, axis=-1), axis=-1)
    return lambda count: place < count


def test_without_a_margin_it_is_the_cache_itself():
    listed = _lists()(BUDGET)
    own = np.full(STEPS, BLOCKS - 1)
    for slots in (BUDGET, 10):
        chosen, fetched = prefer_held(Lists(listed, listed, listed), own, slots)
        np.testing.assert_array_equal(chosen, listed)
        expected = slot_misses(listed, own, [slots])[..., 0]
        np.testing.assert_array_equal(fetched, expected)


def test_with_a_margin_held_blocks_come_first():
    taken = _lists()
    own = np.full(STEPS, BLOCKS - 1)
    lists = Lists(taken(BUDGET - 2), taken(BUDGET), taken(BUDGET + 2))
    chosen, fetched = prefer_held(lists, own, 8)
    assert (chosen.sum(-1) == BUDGET).all()
    assert (chosen | ~lists.sure).all() and (lists.wide | ~chosen).all()
    plain = slot_misses(lists.listed, own, [8])[..., 0]
    assert fetched.sum() < 0.9 * plain.sum()
