"""A cache that evicts: the tokens and blocks of a whole one, in less memory."""

import dataclasses

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.cache.evict import kept_blocks
from sparda_jax.engine.placement import refuse_on_mesh
from sparda_jax.engine.session import Session

SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)
EVICT = sj.CacheConfig(kind="evict")
SIZES = (640, 350, 70)  # whole blocks, a growing one, fewer than the budget
NEW = 70


def _prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 128, size).tolist() for size in SIZES]


def _both(model, attention, storage):
    lm = sj.load(model, attention=attention, sparse=SPARSE, storage=storage)
    ways = (lm, sj.with_attention(lm, attention, cache=EVICT))
    asked = {"max_new_tokens": NEW, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    return [sj.generate(way, _prompts(), **asked) for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "attention", "storage"),
    [
        pytest.param("tiny", "snapkv", "stacked", marks=pytest.mark.long),
        ("tiny", "snapkv", "per_layer"),
        # As one that chooses by votes does, above.
        pytest.param("tiny", "window", "stacked", marks=pytest.mark.long),
        pytest.param("tiny-nosa", "snapkv", "stacked", marks=pytest.mark.long),
    ],
)
def test_it_gives_what_a_whole_cache_gives_and_holds_less(model, attention, storage):
    whole, kept = _both(model, attention, storage)
    assert kept.tokens == whole.tokens
    assert kept.stats.decode_blocks == whole.stats.decode_blocks
    assert "room for" in kept.stats.policy
    state, reference = kept.conversation.state, whole.conversation.state
    lengths = np.asarray(state.lengths)
    gone = 0
    for layer, all_of_it in zip(
        state.cache.layers, reference.cache.layers, strict=True
    ):
        table, kv = np.asarray(layer.page_table), np.asarray(layer.kv)
        expected, size = np.asarray(all_of_it.kv), kv.shape[4]
        assert kv.shape[3] < layer.num_blocks
        for at in np.ndindex(*table.shape[:3]):
            held = lengths[at[1]]
            for block in range(-(-held // size)):
                place = table[(*at, block)]
                gone += place < 0
                if place >= 0:
                    count = min(size, held - block * size)
                    np.testing.assert_allclose(
                        kv[(*at, place)][:count],
                        expected[(*at, block)][:count],
                        atol=1e-5,
                    )
    assert gone  # the long prompts' other blocks are nowhere


@pytest.mark.slow
@pytest.mark.long  # ragged rows are those of a whole cache: above
def test_a_row_is_the_same_alone_and_in_a_batch():
    lm = sj.load("tiny", attention="snapkv", sparse=SPARSE, cache=EVICT)
    together = sj.generate(lm, _prompts(), max_new_tokens=8, ignore_eos=True)
    one = sj.generate(lm, _prompts()[:1], max_new_tokens=8, ignore_eos=True)
    assert one.tokens == together.tokens[:1]


def test_room_is_for_a_list_and_the_answer():
    lm = sj.load("tiny", attention="snapkv", sparse=SPARSE)
    settings = dataclasses.replace(lm.settings, evict=True)
    assert kept_blocks(settings, 24 * 64, 70) == 6 + 2
    assert kept_blocks(settings, 8 * 64, 70) is None
    assert kept_blocks(lm.settings, 24 * 64, 70) is None


def test_what_it_cannot_do_is_refused():
    lm = sj.load("tiny", attention="snapkv", sparse=SPARSE, cache=EVICT)
    out = sj.generate(lm, [[2, 3, 4]], max_new_tokens=2)
    assert "too short" in out.stats.policy
    for call in (
        lambda: sj.generate(lm, [[5]], conversation=out.conversation),
        out.conversation.fork,
    ):
        with pytest.raises(sj.ConfigError, match="given back blocks of its prompt"):
            call()
    with pytest.raises(sj.ConfigError, match=r"kind='evict'.*'resident'"):
        Session.open(lm, rows=1, max_context=256)
    other = sj.with_attention(lm, "infllm_v2")
    with pytest.raises(sj.ConfigError, match=r"infllm_v2.*snapkv, window"):
        sj.generate(other, [[2, 3, 4]], max_new_tokens=2)
    verified = sj.CacheConfig(kind="evict", exactness="verify")
    with pytest.raises(sj.ConfigError, match="exactness='verify'"):
        sj.generate(sj.with_attention(lm, "snapkv", cache=verified), [[2, 3]])
    settings = dataclasses.replace(lm.settings, evict=True)
    with pytest.raises(sj.ConfigError, match="mesh"):
        refuse_on_mesh(settings)
