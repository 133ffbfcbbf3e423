"""Offloaded KV through the public calls: the same tokens, clear refusals."""

import jax
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.config import CacheConfig, ConfigError


@pytest.fixture(scope="module")
def prompts(token_ids):
    return [token_ids(length, seed=length) for length in (600, 3, 130)]


HOT = {"temperature": 1.5, "ignore_eos": True, "max_new_tokens": 80}


@pytest.fixture(scope="module")
def expected(lm, prompts):
    return sj.generate(lm, prompts, **HOT)


@pytest.mark.slow
@pytest.mark.long  # `test_offload`, bit for bit; `test_fork`
@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(kind="offload", device_blocks=None, route="dynamic_slice"),
        pytest.param(
            CacheConfig(kind="offload", device_blocks=None, route="host_loop"),
            marks=pytest.mark.long,  # `test_routes_leave_the_same_cache`
        ),
        pytest.param(
            CacheConfig(
                kind="offload",
                device_blocks=None,
                route="host_loop",
                prefetch="none",
                layer0="offload",
            ),
            marks=pytest.mark.long,  # that route, and `test_offload`'s conversations
        ),
    ],
    ids=["dynamic_slice", "host_loop", "host_loop, none, layer 0 offloaded"],
)
def test_generate_gives_the_same_tokens(lm, prompts, expected, token_ids, cache):
    offloaded = sj.with_attention(lm, "sparda", cache=cache)
    out = sj.generate(offloaded, prompts, **HOT)
    assert out.tokens == expected.tokens
    stats = out.stats.offload
    assert stats is not None
    assert stats.route == cache.route
    assert 0 < stats.misses < stats.hits
    assert stats.fetched_bytes == stats.misses * 64 * 2 * 16 * 4
    assert expected.stats.offload is None


@pytest.mark.slow
def test_routes_leave_the_same_cache(lm, prompts):
    """Keys and values of every generated token, in slots and host store."""
    caches = []
    for route in ("dynamic_slice", "host_loop"):
        cache = CacheConfig(kind="offload", route=route, device_blocks=7)
        out = sj.generate(sj.with_attention(lm, "sparda", cache=cache), prompts, **HOT)
        caches.append(out.conversation.state.cache)
    first, second = caches
    np.testing.assert_array_equal(first.store.to_numpy(), second.store.to_numpy())
    for a, b in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(a.table.blocks, b.table.blocks)
        np.testing.assert_array_equal(a.slots, b.slots)


@pytest.mark.slow
@pytest.mark.long  # resident: `test_further_turn_is_one_prompt`; turns: `test_offload`
def test_conversation_grows(lm, prompts, token_ids):
    """A second turn that needs a larger cache, streamed, against a resident one."""
    more = [token_ids(length, seed=9 + length) for length in (400, 900, 2)]
    results = []
    for cache in (CacheConfig(), CacheConfig(kind="offload", device_blocks=None)):
        chosen = sj.with_attention(lm, "sparda", cache=cache)
        first = sj.generate(chosen, prompts, **HOT)
        stream = sj.stream(
            chosen, more, conversation=first.conversation, prefill_chunk=256, **HOT
        )
        for _ in stream:
            pass
        results.append(stream.output.tokens)
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.long  # resident: `test_second_length_does_not_recompile`
def test_lengths_share_a_program(lm, token_ids):
    chosen = sj.with_attention(
        lm, "sparda", cache=CacheConfig(kind="offload", device_blocks=None)
    )
    sj.generate(chosen, [token_ids(400)], max_new_tokens=20)
    for length in (390, 420, 450):
        out = sj.generate(chosen, [token_ids(length)], max_new_tokens=25)
        assert out.stats.compile_seconds == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "swap"}, "CacheConfig.kind='swap'"),
        ({"route": "warp"}, "CacheConfig.route='warp'"),
        ({"prefetch": "yes"}, "CacheConfig.prefetch='yes'"),
        ({"layer0": "disk"}, "CacheConfig.layer0='disk'"),
        ({"exactness": "maybe"}, "CacheConfig.exactness='maybe'"),
        ({"device_blocks": 0}, "CacheConfig.device_blocks=0"),
        ({"recall_every": -1}, "CacheConfig.recall_every=-1"),
        ({"host_limit": 0.5}, "CacheConfig.host_limit=0.5"),
    ],
)
def test_bad_settings_are_refused(settings, message, without_type_checks):
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    ("attention", "settings", "message"),
    [
        ("sparda", {"device_blocks": 3}, "device_blocks=3.*at least 6"),
        ("dense", {"device_blocks": 6}, "device_blocks=6.*at least 12"),
        ("infllm_v2", {"prefetch": "lookahead"}, "only an attention that forecasts"),
        ("infllm_v2", {"exactness": "verify"}, "verifies a forecast"),
        ("sparda", {"route": "mosaic"}, "route='mosaic': .*needs a CUDA device"),
        ("sparda", {"route": "triton"}, "route='triton': .*needs a CUDA device"),
        (
            "sparda",
            {"route": "host_loop", "exactness": "verify"},
            "fetches inside",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(lm, token_ids, attention, settings, message):
    if jax.default_backend() != "cpu" and "CUDA" in message:
        pytest.skip("there is a device")
    cache = CacheConfig(kind="offload", **settings)
    chosen = sj.with_attention(lm, attention, cache=cache)
    with pytest.raises(ConfigError, match=message):
        sj.generate(chosen, [token_ids(700)], max_new_tokens=4)


def test_no_host_memory_kind_is_refused(lm, token_ids, monkeypatch):
    from sparda_jax.cache import memory

    monkeypatch.setattr(memory, "HOST_KIND", "tape")
    chosen = sj.with_attention(
        lm, "sparda", cache=CacheConfig(kind="offload", device_blocks=None)
    )
    with pytest.raises(ConfigError, match="needs the memory kind 'tape'"):
        sj.generate(chosen, [token_ids(700)], max_new_tokens=4)


@pytest.mark.parametrize(
    ("old", "new"), [("slices", "dynamic_slice"), ("steps", "host_loop")]
)
def test_old_names_of_routes_warn(old, new, without_type_checks):
    with pytest.warns(FutureWarning, match=f"route='{old}' is called '{new}' now"):
        cache = CacheConfig(kind="offload", device_blocks=None, route=old)
    assert cache.route == new


@pytest.mark.slow
@pytest.mark.long  # divided, resident: `test_mesh`
def test_experts_change_nothing(prompts):
    """A model with experts: offloaded and resident give the same tokens."""
    lm = sj.load(
        "tiny-moe", attention="sparda", forecast="from_query", storage="stacked"
    )
    cache = CacheConfig(kind="offload", device_blocks=None, route="dynamic_slice")
    settings = {"max_new_tokens": 40, "ignore_eos": True}
    tokens = [
        sj.generate(model, prompts[:1], **settings).tokens
        for model in (lm, sj.with_attention(lm, "sparda", cache=cache))
    ]
    assert tokens[0] == tokens[1]
