"""One token's choices: against the lists of the whole pass, and a dense softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.checks import ConfigError
from sparda_jax.evaluation.forecast_measure import make_plan, walk_layers
from sparda_jax.evaluation.token_choices import TokenChoices, token_choices
from sparda_jax.models.block import before_attention

TOKENS = 47


@pytest.fixture(scope="module")
def lm(fine_lm):
    return fine_lm


@pytest.fixture(scope="module")
def ids(lm):
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, TOKENS)


@pytest.fixture(scope="module")
def plan(lm):
    return make_plan(lm, TOKENS, buckets=3)


def test_lists_are_those_of_the_pass_and_mass_is_the_softmax(lm, ids, plan):
    token = TOKENS - 2
    found = token_choices(lm, ids, token, plan)
    group = lm.config.group_size
    for number, passed in enumerate(walk_layers(lm, ids, plan)):
        at = np.asarray(passed.listed)[:, :, token - TOKENS]
        np.testing.assert_array_equal(found.forecast[number], at[0] & found.optional)
        np.testing.assert_array_equal(found.own[number], at[1] & found.optional)
        _, q, k, *_ = before_attention(
            passed.block.weights, lm.config, passed.hidden, passed.rope_cos_sin
        )
        keys = jnp.repeat(k[0, : token + 1], group, axis=1)
        logits = jnp.einsum("nh,snh->ns", q[0, token], keys) * q.shape[-1] ** -0.5
        weights = np.asarray(jax.nn.softmax(logits, axis=-1))
        weights = np.pad(weights, ((0, 0), (0, 48 - token - 1)))
        mass = weights.reshape(-1, group, 12, 4).sum(-1).mean(1)
        np.testing.assert_allclose(found.mass[number], mass, atol=1e-6)
    # Block 0, the block before the token's own and its own are forced.
    assert np.flatnonzero(found.optional).tolist() == list(range(1, 10))


def test_the_worst_miss_has_the_most_mass():
    order = np.arange(4)
    choices = TokenChoices(
        token=15,
        budget=2,
        forecast_place=np.array([[order, order[::-1]]]),
        own_place=np.array([[order, order]]),
        mass=np.array([[[0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]]]),
        optional=np.ones(4, bool),
    )
    assert choices.worst_miss() == (0, 1, 1)
    same = TokenChoices(
        15, 2, choices.own_place, choices.own_place, choices.mass, choices.optional
    )
    assert same.worst_miss() is None


@pytest.mark.parametrize("token", [-1, 3, 19, TOKENS])
def test_tokens_without_a_choice_are_refused(lm, ids, plan, token):
    with pytest.raises(ConfigError, match="token"):
        token_choices(lm, ids, token, plan)
