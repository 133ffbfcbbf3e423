"""Totals neither wrap nor round, however long a generation is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.cache.counters import FetchCounters, FetchTotals, WideCount

COUNTS = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3)
BIG = st.lists(st.integers(0, 2**62), min_size=3, max_size=3)


def _wide(values: list[int]) -> WideCount:
    whole = np.asarray(values, np.uint64)
    high, low = whole >> np.uint64(32), whole & np.uint64(2**32 - 1)
    return WideCount(jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32))


@pytest.mark.parametrize(
    "examples", [25, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_words_are_python_integers(examples):
    check = given(held=BIG, more=COUNTS, other=BIG)(_check_words)
    settings(max_examples=examples)(check)()


def _check_words(held, more, other):
    wide = _wide(held)
    added = wide.add(jnp.asarray(more, jnp.int32)).to_numpy().tolist()
    assert added == [a + b for a, b in zip(held, more, strict=True)]
    both = wide.plus(_wide(other)).to_numpy().tolist()
    assert both == [a + b for a, b in zip(held, other, strict=True)]
    assert int(WideCount.total(jnp.asarray(more, jnp.int32)).to_numpy()) == sum(more)


def test_a_million_tokens_of_large_counts():
    counts = jnp.full((64, 16_384), 2**31 - 1, jnp.int32)
    total = int(jax.jit(WideCount.total)(counts).to_numpy())
    assert total == counts.size * (2**31 - 1) > 2**50


def test_fetches_beyond_32_bits():
    step = FetchCounters(*(jnp.full((2,), 2**31 - 1, jnp.int32) for _ in range(5)))
    totals = FetchTotals.zero(2)
    for _ in range(5):
        totals = totals.add(step)
    for count in totals:
        assert count.to_numpy().tolist() == [5 * (2**31 - 1)] * 2
