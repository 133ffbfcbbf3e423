"""Filters and random streams of the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.inference.sampling import (
    SamplingConfig,
    _filter,
    sample,
    sampling_state,
)

VOCAB = 40
_FILTER = jax.jit(_filter, static_argnums=2)


def _logits(seed, rows=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((rows, VOCAB)) * 3, jnp.float32)


def _kept(logits, **config):
    state = sampling_state(SamplingConfig(temperature=1.0, **config), 0, len(logits))
    return np.isfinite(np.asarray(_FILTER(logits, state, VOCAB)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 60))
def test_top_k_keeps_the_k_best(seed, k):
    logits = _logits(seed)
    order = np.argsort(-np.asarray(logits[0]))
    kept = _kept(logits, top_k=k)[0]
    assert set(np.flatnonzero(kept)) == set(order[:k])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p):
    logits = _logits(seed)
    kept = _kept(logits, top_p=p)[0]
    probability = np.exp(np.asarray(logits[0], np.float64))
    probability /= probability.sum()
    chosen = np.sort(probability[kept])[::-1]
    assert chosen.sum() >= p - 1e-5
    assert chosen[:-1].sum() < p + 1e-5
    assert chosen.min() >= probability[~kept].max(initial=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), p=st.floats(0.0, 1.0))
def test_min_p_is_relative_to_the_best(seed, p):
    logits = _logits(seed)
    kept = _kept(logits, min_p=p)[0]
    ratio = np.exp(np.asarray(logits[0]) - float(logits.max()))
    clear = np.abs(ratio - p) > 1e-5
    np.testing.assert_array_equal(kept[clear], (ratio >= p)[clear])
    assert kept[ratio.argmax()]


def test_frequencies_follow_the_filtered_distribution():
    """20,000 draws at top_k=3: three tokens, at their renormalised probabilities."""
    draws = 20_000
    logits = jnp.broadcast_to(_logits(3)[0], (draws, VOCAB))
    config = SamplingConfig(temperature=0.7, top_k=3)
    state = sampling_state(config, list(range(draws)), draws)
    seen = jnp.zeros((draws, VOCAB), bool)
    tokens = np.asarray(sample(logits, seen, jnp.zeros((draws,), jnp.int32), state))
    counts = np.bincount(tokens, minlength=VOCAB) / draws
    best = np.argsort(-np.asarray(logits[0]))[:3]
    weight = np.exp(np.asarray(logits[0])[best] / 0.7)
    np.testing.assert_allclose(counts[best], weight / weight.sum(), atol=0.015)
    assert counts[best].sum() == pytest.approx(1.0)


def test_a_draw_is_that_of_a_categorical_of_the_seed_and_the_place():
    logits = _logits(5, rows=8)
    state = sampling_state(SamplingConfig(temperature=1.0), list(range(8)), 8)
    places = jnp.arange(8) * 3
    drawn = sample(logits, jnp.zeros(logits.shape, bool), places, state)
    for row, token in enumerate(drawn):
        key = jax.random.fold_in(jax.random.key(row), places[row])
        assert token == jax.random.categorical(key, logits[row])


def test_zero_temperature_rows_are_greedy_beside_hot_ones():
    logits = _logits(1, rows=2)
    state = sampling_state(SamplingConfig(temperature=5.0), [1, 2], 2)
    state = state._replace(temperature=jnp.array([0.0, 5.0]))
    seen = jnp.zeros((2, VOCAB), bool)
    draw = jax.jit(sample)
    drawn = {
        tuple(np.asarray(draw(logits, seen, jnp.full((2,), place), state)))
        for place in range(20)
    }
    assert {row[0] for row in drawn} == {int(logits[0].argmax())}
    assert len({row[1] for row in drawn}) > 3


def test_penalty_weakens_seen_tokens_of_either_sign():
    logits = jnp.array([[2.0, -1.0, 1.9, -0.4]])
    state = sampling_state(SamplingConfig(repetition_penalty=2.0), 0, 1)
    seen = jnp.array([[True, True, False, False]])
    place = jnp.zeros((1,), jnp.int32)
    assert int(sample(logits, seen, place, state)[0]) == 2
    only = jnp.array([[-3.0, -1.0, -4.0, -1.5]])
    assert int(sample(only, seen, place, state)[0]) == 3


def test_a_temperature_that_would_overflow_is_greedy():
    logits = _logits(3, rows=2)
    state = sampling_state(SamplingConfig(temperature=1e-40), 0, 2)
    seen = jnp.zeros(logits.shape, bool)
    token = sample(logits, seen, jnp.zeros(2, jnp.int32), state)
    np.testing.assert_array_equal(token, jnp.argmax(logits, axis=1))
