"""Conversations belong to what began them; what is printed of results stays short."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import sparda_jax as sj
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.conversation import MadeWith

SHORT = {"max_new_tokens": 3, "ignore_eos": True}
# As many rows as in the tests of generation: the same programs run them.
ROWS = [[5, 6], [7, 8, 9], [4]]
TURN = [[4], [4], [4]]


@pytest.fixture(scope="module")
def begun(lm):
    """An output whose conversation the refusals of this module leave as it is."""
    return sj.generate(lm, ROWS, **SHORT)


def _replaced(lm, **changes):
    return dataclasses.replace(lm, **changes)


_OTHERS = {
    "attention='sparda'.*'dense'": lambda lm: sj.with_attention(lm, "dense"),
    "block_budget=6.*7": lambda lm: _replaced(
        lm, sparse=dataclasses.replace(lm.sparse, block_budget=7)
    ),
    "kind='resident'.*'offload'": lambda lm: _replaced(
        lm, cache=CacheConfig(kind="offload", device_blocks=None)
    ),
    "exactness='forecast'": lambda lm: _replaced(
        lm, cache=CacheConfig(exactness="verify")
    ),
    "rms_norm_eps": lambda lm: _replaced(
        lm, config=dataclasses.replace(lm.config, rms_norm_eps=1e-3)
    ),
    "other weights": lambda lm: _replaced(
        lm, model=jax.tree.map(lambda weights: weights, lm.model)
    ),
    "vocab_size": lambda lm: sj.load(
        "tiny-nosa",
        attention="sparda",
        forecast="from_query",
        sparse=lm.sparse,
        storage="stacked",
    ),
}


@pytest.mark.parametrize("named", list(_OTHERS))
def test_another_model_is_refused_before_it_compiles(lm, begun, named):
    other = _OTHERS[named](lm)
    if named == "vocab_size":
        named = "ModelConfig.key_bias=False"
    compiled = PROGRAMS.compiled
    with pytest.raises(ConfigError, match=f"conversation was made with.*{named}"):
        sj.generate(other, TURN, conversation=begun.conversation)
    assert PROGRAMS.compiled == compiled
    assert not begun.conversation.used_up


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "resident"}, "kind='offload'"),
        ({"device_blocks": 9}, "device_blocks=8"),
        ({"prefetch": "none"}, "prefetch=None"),
        ({"layer0": "offload"}, "layer0='auto'"),
        ({"route": "host_loop"}, "route='dynamic_slice'"),
        ({"codec": "int8"}, "codec='exact'"),
        ({"layers_ahead": 2}, "layers_ahead=1"),
    ],
)
def test_another_offloaded_cache_is_refused(lm, change, named):
    cache = CacheConfig(kind="offload", device_blocks=8, route="dynamic_slice")
    made = MadeWith.of(lm, cache)
    limits = dataclasses.replace(cache, host_limit=2**30, recall_every=4)
    for same in (cache, limits, dataclasses.replace(cache, kind="auto")):
        made.check(dataclasses.replace(lm, cache=same))
    other = dataclasses.replace(lm, cache=dataclasses.replace(cache, **change))
    with pytest.raises(ConfigError, match=named):
        made.check(other)


def test_texts_of_results_are_short(lm):
    out = sj.generate(lm, ROWS, **SHORT)
    assert repr(lm) == (
        "LanguageModel('tiny', attention='sparda', float32, storage='stacked', "
        "cache='resident')"
    )
    assert "3 rows of 4, 5, 3 tokens, resident" in repr(out.conversation)
    assert "3 rows of 3, 3, 3 new tokens" in repr(out)
    # A row alone: its turn has a program of other tests.
    out = sj.generate(lm, [[4]], **SHORT)
    told, new = repr(out.conversation), repr(out)
    stream = sj.stream(lm, TURN[:1], conversation=out.conversation, **SHORT)
    assert "not finished" in repr(stream)
    list(stream)
    # The first output's buffers are gone; what it says stays.
    assert "new token" in new and new.partition("new token")[0] in repr(out)
    assert "used up" not in told + new
    assert "used up" in repr(out) and "used up" in repr(out.conversation)
    assert "finished: " in repr(stream) and "used up" not in repr(stream)
    for value in (lm, lm.model, out, out.conversation, stream, stream.output):
        assert len(repr(value)) < 400 and "\n" not in repr(value)
    # Identity: comparing arrays would raise.
    assert out == out and out != stream.output


def test_logits_that_are_not_finite_end_their_row_alone(lm, begun):
    """NaN weights: no token is made up, the row says so, and its neighbour goes on."""
    model = jax.tree.map(lambda weights: weights, lm.model)
    model.head = nnx.data(
        nnx.Param(lm.model.embedding[...])
    )  # the tied head stays whole
    model.embedding[...] = model.embedding[...].at[9].set(jnp.nan)
    out = sj.generate(_replaced(lm, model=model), ROWS, **SHORT)
    assert out.tokens == [begun.tokens[0], [], begun.tokens[2]]
    assert out.finish_reasons == ["length", "non_finite", "length"]
    stream = sj.stream(_replaced(lm, model=model), [[9], *ROWS[::2]], **SHORT)
    assert sorted(event.index for event in stream) == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ConfigError, match="row 1 ended on logits that are not finite"):
        sj.generate(_replaced(lm, model=model), TURN, conversation=out.conversation)
