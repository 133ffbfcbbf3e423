"""What holds for all selectors that there are, with a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.sparse.selectors import get_selector, selector_names
from sparda_jax.sparse.selectors.magicpig_tokens import MagicPIGTokens

# Six blocks; the cache has room for 24.
IDS = np.random.default_rng(0).integers(2, 128, 330).tolist()


def _logits(run):
    """Of the prompt, and of a few steps behind it."""
    out = run.prefill(run.empty(1), [IDS], [0])
    seen, cache = [out.logits[:, : len(IDS)]], out.cache
    for step in range(3):
        out = run.decode(cache, [7 + step], [len(IDS) + step])
        seen, cache = [*seen, out.logits], out.cache
    return jnp.concatenate(seen, axis=1)


# In CI `quest` and `sparda_bounds` stand for their indices; `test_invariants` holds the
# same for `sparda` and `nosa`, `test_reuse` what that gives, and the tests of the rest,
# in tests/sparda_jax/sparse, their lists.
OF_OTHERS = ("quest_16", "infllm_v2_bounds", "infllm_v2", "nosa", "sparda")
OF_OTHERS += ("infllm", "random", "reuse")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long if n in OF_OTHERS else ())
        for n in selector_names()
        if not get_selector(n).dense
    ],
)
def test_with_a_full_budget_it_is_dense(name, runner):
    nosa = name == "nosa"
    # A window has no budget but the forced blocks.
    local = 6 if name == "window" else 2
    run = runner(name, block_budget=8, local_blocks=local)
    assert run.settings.selector.lists_blocks(24, run.settings.sparse)
    dense = _logits(runner("dense", nosa=nosa))
    np.testing.assert_allclose(_logits(run), dense, atol=2e-4)
    if name != "window":
        few = _logits(runner(name, block_budget=4))
        assert np.abs(few[:, -3:] - dense[:, -3:]).max() > 1e-2


@pytest.mark.slow
def test_sampling_every_token_is_dense_and_few_of_them_is_not(runner):
    """One sign and many tables: every token is sampled, and its chance is 1."""
    run, dense = runner("magicpig_tokens"), _logits(runner("dense"))

    def sampled(**fields):
        selector = MagicPIGTokens(first=0, last=0, dense_every=64, **fields)
        settings = dataclasses.replace(run.settings, selector=selector)
        return _logits(dataclasses.replace(run, settings=settings))

    np.testing.assert_allclose(sampled(bits=1, tables=200), dense, atol=5e-3)
    assert np.abs(sampled(bits=15, tables=2) - dense).max() > 1e-2


@pytest.mark.slow
def test_single_tokens_are_attended_to_in_an_offloaded_cache_of_all_blocks(token_ids):
    """Ragged rows and a second turn: the tokens of a resident cache."""
    turns = [[token_ids(180), token_ids(70, seed=1)], [[5, 9], token_ids(66, seed=2)]]

    def talk(cache):
        lm = sj.load("tiny", attention="magicpig_tokens", cache=cache)
        conversation, found = None, []
        for prompts in turns:
            out = sj.generate(
                lm,
                prompts,
                conversation=conversation,
                max_new_tokens=4,
                ignore_eos=True,
            )
            conversation = out.conversation
            found.append(out.tokens)
        return found

    assert talk(sj.CacheConfig(kind="offload")) == talk(sj.CacheConfig())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device_blocks": 2}, r"device_blocks=2 .*at least \d+, the blocks that one"),
        ({"codec": "int8_slots"}, r"codec='int8_slots'.*magicpig_tokens.*'exact' or"),
        ({"exactness": "verify"}, r"exactness='verify'.*magicpig_tokens.*forecast"),
        ({"prefetch": "lookahead"}, r"prefetch='lookahead'.*magicpig_tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["offload", "auto"])
def test_single_tokens_need_a_slot_for_every_block(kind, given, words):
    cache = sj.CacheConfig(kind=kind, **given)
    lm = sj.load("tiny", attention="magicpig_tokens", cache=cache)
    with pytest.raises(sj.ConfigError, match=words):
        sj.generate(lm, [list(range(2, 128)) * 2], max_new_tokens=2)


def test_what_is_not_published_so_is_called_a_style():
    labels = {name: get_selector(name).label for name in selector_names()}
    styles = {"quest", "quest_16", "infllm", "snapkv", "magicpig", "infinigen"}
    assert {name for name, label in labels.items() if "-style" in label} == styles
    for name in styles:
        assert labels[name] in get_selector(name).summary
