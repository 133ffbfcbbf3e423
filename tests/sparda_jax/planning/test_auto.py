"""What `auto` decides, and that it says why."""

import dataclasses
import re

import pytest

import sparda_jax as sj
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.planning.auto import Probe, offload_settings
from sparda_jax.sparse.selectors import get_selector

# 10 ms a step, 100 MB missed at 20 GB/s: half of the step is the fetch.
HEAVY = Probe(0.010, 100e6, 20e9, hidden=0.8)


def test_a_heavy_fetch_is_looked_ahead_for():
    assert HEAVY.look_ahead
    assert HEAVY.saved_seconds == pytest.approx(0.004)
    assert "one layer ahead" in HEAVY.reason()
    assert "100.00 MB missed take 5.00 ms at 20.0 GB/s" in HEAVY.reason()


@pytest.mark.parametrize(
    "change",
    [
        {"missed_bytes": 1e6},  # nothing much to hide
        {"hidden": 0.0},  # a device on which nothing overlaps
        {"missed_bytes": 400e6},  # all link: no compute to hide behind
    ],
)
def test_what_is_not_worth_it_stays_on_demand(change):
    probe = dataclasses.replace(HEAVY, **change)
    assert not probe.look_ahead
    assert "on demand" in probe.reason()


def test_who_looks_several_layers_ahead():
    cache = CacheConfig(
        kind="offload", device_blocks=None, layers_ahead=2, route="dynamic_slice"
    )
    found = offload_settings(cache, get_selector("sparda"))
    assert found is not None and found.layers_ahead == 2
    with pytest.raises(ConfigError, match="layers_ahead=2 is not allowed with atten"):
        offload_settings(cache, get_selector("reuse"))
    loop = dataclasses.replace(cache, route="host_loop")
    with pytest.raises(ConfigError, match=r"not allowed with CacheConfig\.route='host"):
        offload_settings(loop, get_selector("sparda"))
    for kind in ("resident", "auto"):
        with pytest.raises(ConfigError, match=r"CacheConfig\.layers_ahead=2"):
            CacheConfig(kind=kind, layers_ahead=2)


@pytest.mark.slow
def test_measured_prefetch_gives_the_same_tokens(lm, token_ids):
    """On a CPU nothing overlaps, so the first steps decide for on demand."""
    settings = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.5}
    prompt = [token_ids(700)]
    expected = sj.generate(lm, prompt, **settings)
    cache = CacheConfig(
        kind="offload", device_blocks=None, prefetch="auto", route="dynamic_slice"
    )
    chosen = sj.with_attention(lm, "sparda", cache=cache)
    first = sj.generate(chosen, prompt, **settings)
    assert first.tokens == expected.tokens
    assert "on demand: of" in first.stats.policy
    assert not first.stats.offload.lookahead
    # The decision is kept: nothing is probed or compiled again.
    again = sj.generate(chosen, prompt, **settings)
    assert again.tokens == expected.tokens
    assert again.stats.compile_seconds == 0
    assert again.stats.policy == first.stats.policy


@pytest.mark.slow
@pytest.mark.long  # of calls that are long enough: above
def test_a_stream_of_small_calls_decides_as_well(lm, token_ids):
    """Four tokens a call are fewer than a trial takes: it goes on from call to call."""
    settings = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.5}
    prompts = [token_ids(700), token_ids(650)]
    expected = sj.generate(lm, prompts, **settings)
    cache = CacheConfig(
        kind="offload", device_blocks=None, prefetch="auto", route="dynamic_slice"
    )
    chosen = sj.with_attention(lm, "sparda", cache=cache)
    stream = sj.stream(chosen, prompts, tokens_per_call=4, **settings)
    assert len(list(stream)) == 80
    assert stream.output.tokens == expected.tokens
    assert "on demand: of" in stream.output.stats.policy
    assert not stream.output.stats.offload.lookahead


@pytest.mark.slow
def test_resident_where_it_fits_and_offload_where_not(lm, token_ids):
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    prompt = [token_ids(2500)]
    cache = CacheConfig(kind="auto", layer0="offload")
    fits = sj.generate(sj.with_attention(lm, "sparda", cache=cache), prompt, **settings)
    assert fits.stats.policy.startswith("resident: it fits")
    assert fits.stats.offload is None

    small = dataclasses.replace(cache, device_limit=_limit_between(lm, prompt))
    chosen = sj.with_attention(lm, "sparda", cache=small)
    moved = sj.generate(chosen, prompt, **settings)
    assert moved.tokens == fits.tokens
    assert moved.stats.policy.startswith("offload: ")
    assert "fit the device" in moved.stats.policy
    assert moved.stats.offload is not None
    slots = moved.conversation.state.cache.num_slots
    assert slots > lm.sparse.largest_budget
    # Whoever goes on finds as many, however it asks.
    for kind in ("auto", "offload"):
        cache = dataclasses.replace(small, kind=kind)
        chosen = sj.with_attention(lm, "sparda", cache=cache)
        more = sj.generate(
            chosen, [[5]], conversation=moved.conversation.fork(), **settings
        )
        assert more.conversation.state.cache.num_slots == slots


def _limit_between(lm, prompt) -> int:
    """A device limit that offload meets and a resident cache does not."""
    sizes = []
    for kind in ("resident", "offload"):
        cache = CacheConfig(kind=kind, layer0="offload", device_limit=1)
        chosen = sj.with_attention(lm, "sparda", cache=cache)
        with pytest.raises(sj.ConfigError) as refused:
            sj.generate(chosen, prompt, max_new_tokens=8)
        need = re.search(
            r"needs ([\d.]+) (KiB|MiB) of device memory", str(refused.value)
        )
        assert need is not None, str(refused.value)
        scale = {"KiB": 2**10, "MiB": 2**20}[need.group(2)]
        sizes.append(float(need.group(1)) * scale)
    resident, offload = sizes
    assert offload < 0.9 * resident
    return int((offload + resident) / 2)


@pytest.mark.slow
def test_auto_without_a_forecast(lm, token_ids):
    cache = CacheConfig(kind="offload", device_blocks=None, prefetch="auto")
    chosen = sj.with_attention(lm, "infllm_v2", cache=cache)
    out = sj.generate(chosen, [token_ids(700)], max_new_tokens=4)
    assert "makes no forecast" in out.stats.policy


def test_one_dispatch_cannot_measure(lm, token_ids):
    cache = CacheConfig(
        kind="offload", device_blocks=None, prefetch="auto", route="dynamic_slice"
    )
    chosen = sj.with_attention(lm, "sparda", cache=cache)
    with pytest.raises(sj.ConfigError, match="prefetch='auto'"):
        sj.generate(chosen, [token_ids(900)], max_new_tokens=4, single_call=True)
