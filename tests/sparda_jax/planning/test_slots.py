"""`device_blocks="auto"`: C fills what is left, and never more."""

import argparse
import dataclasses
import re

import numpy as np
import pytest
from planning_cases import Case

import sparda_jax as sj
from sparda_jax.cli.cache_options import add_cache_options, cache_config
from sparda_jax.config import ConfigError
from sparda_jax.machine import Limit
from sparda_jax.planning.limits import MemoryLimits
from sparda_jax.planning.memory import memory_plan
from sparda_jax.planning.slots import fill_slots

CASE = Case(kind="offload", slots="auto", prompt=3900, batch=3)
BLOCKS = CASE.shapes.capacity // 64


def _fill(case, limits, others=0):
    return fill_slots(
        case.settings,
        case.cache,
        limits,
        batch=case.batch,
        shapes=case.shapes,
        dtype=case.dtype,
        storage=case.storage,
        others=others,
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 0.99, 1.0])
def test_slots_fill_what_is_left(share):
    least = dataclasses.replace(CASE, slots=None).plan()
    most = dataclasses.replace(CASE, slots=BLOCKS).plan()
    tables = most.slot_tables - least.slot_tables
    free = share * (most.slots - least.slots + tables)
    device = Limit(round((least.device + free) / 0.95) + 1, "a test")
    cache, plan = _fill(CASE, MemoryLimits(device=device))
    found = dataclasses.replace(CASE, slots=cache.device_blocks).plan()
    assert plan == found
    assert found.device <= device.size
    width = CASE.settings.selector.list_width(BLOCKS, CASE.settings.sparse)
    room = width + int(share * (BLOCKS - width))
    if share == 1.0:
        assert cache.device_blocks == BLOCKS
    else:
        # Sizes are a quarter apart.
        assert width <= cache.device_blocks <= room
        assert cache.device_blocks == width or room < 1.25 * cache.device_blocks + 1
        assert cache.device_blocks > width or room < 1.25 * width + 1
    # What other arrays hold is not there for slots.
    again, _ = _fill(CASE, MemoryLimits(device=device), others=round(free))
    assert again.device_blocks == width


def test_layer_0_gives_way_where_two_lists_and_not_all_blocks_fit():
    auto = dataclasses.replace(CASE, layer0="auto")
    width = CASE.settings.selector.list_width(BLOCKS, CASE.settings.sparse)

    def decided(slots, layer0="resident", host=None):
        """Where so many slots fit with layer 0 there."""
        size = dataclasses.replace(CASE, slots=slots, layer0=layer0).plan().device
        device = Limit(round(size / 0.95) + 1, "a test")
        cache, plan = _fill(auto, MemoryLimits(device=device, host=host))
        found = dataclasses.replace(
            CASE, slots=cache.device_blocks, layer0=cache.layer0
        )
        assert plan == found.plan() and plan.device <= device.size
        return cache

    everything = _fill(auto, MemoryLimits())[0]
    assert (everything.device_blocks, everything.layer0) == (BLOCKS, "resident")
    # Nothing else fits there.
    assert decided(width + 1, "offload").layer0 == "offload"
    far = decided(3 * width)
    assert far.layer0 == "offload" and 3 * width <= far.device_blocks < BLOCKS
    store = Limit(dataclasses.replace(CASE, slots=None).plan().host, "a test")
    assert decided(3 * width, host=store).layer0 == "resident"
    # As many slots as were asked for: where layer 0 lives is still open.
    for layer0 in ("resident", "offload"):
        size = dataclasses.replace(CASE, slots=width, layer0=layer0).plan().device
        asked = dataclasses.replace(auto, slots=width)
        cache, plan = _fill(asked, MemoryLimits(device=Limit(size, "a test")))
        assert plan.device == size and cache.device_blocks == width
        assert (cache.layer0 == "offload") == (layer0 == "offload")


def test_limits_that_are_not_known_or_shared():
    assert _fill(CASE, MemoryLimits())[0].device_blocks == BLOCKS
    least = dataclasses.replace(CASE, slots=None).plan()
    both = Limit(round((least.device + least.host) / 0.95) + 1, "a test")
    assert _fill(CASE, MemoryLimits(both=both))[0].device_blocks < BLOCKS
    fixed = dataclasses.replace(CASE, slots=11)
    cache, plan = _fill(fixed, MemoryLimits())
    assert cache.device_blocks == 11
    assert plan == memory_plan(
        fixed.settings,
        fixed.cache,
        batch=3,
        shapes=fixed.shapes,
        dtype="float32",
        storage="stacked",
    )


def test_what_auto_is_not(without_type_checks):
    for value in (0, -1, "all", 1.5, True):
        with pytest.raises(ConfigError, match=r"device_blocks=.*or 'auto'"):
            sj.CacheConfig(device_blocks=value)


@pytest.mark.slow
@pytest.mark.long  # `test_resident_where_it_fits_and_offload_where_not`
def test_all_blocks_fetch_nothing_and_a_conversation_keeps_its_slots(token_ids, lm):
    prompts = [token_ids(700, seed=1), token_ids(90, seed=2)]
    how = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.2}
    turns = []
    for cache in (
        sj.CacheConfig(),
        sj.CacheConfig(kind="offload", device_blocks="auto"),
        sj.CacheConfig(kind="offload", device_blocks="auto", device_limit=3_900_000),
    ):
        placed = dataclasses.replace(lm, cache=cache)
        first = sj.generate(placed, prompts, **how)
        held = first.conversation.state.cache
        slots = held.num_slots if cache.kind == "offload" else None
        grown = dataclasses.replace(cache, device_limit=None)
        placed = dataclasses.replace(lm, cache=grown)
        second = sj.generate(
            placed, [[5] * 600, [7]], conversation=first.conversation, **how
        )
        turns.append((first, second, slots))
        if slots is not None:
            assert second.conversation.state.cache.num_slots == slots
            assert f"device_blocks: {slots} of" in first.stats.policy
    for first, second, _ in turns[1:]:
        assert first.tokens == turns[0][0].tokens
        assert second.tokens == turns[0][1].tokens
    blocks = turns[1][0].conversation.state.cache.num_blocks
    assert turns[1][2] == blocks and turns[1][0].stats.offload.misses == 0
    assert 6 <= turns[2][2] < blocks and turns[2][0].stats.offload.misses > 0
    assert np.asarray(turns[1][0].stats.offload.hits) > 0


def test_what_is_taken_where_nothing_is_said(capsys):
    """Slots that fill the device, wherever an offloaded cache is asked for."""
    assert sj.CacheConfig(kind="offload").device_blocks == "auto"
    parser = argparse.ArgumentParser()
    add_cache_options(parser)
    assert cache_config(parser.parse_args([])) == sj.CacheConfig(kind="auto")
    offload = parser.parse_args(["--cache", "offload"])
    assert cache_config(offload) == sj.CacheConfig(kind="offload")
    # None is the least that there can be.
    assert sj.CacheConfig(kind="offload", device_blocks=None).slots(100, 8) == 8


@pytest.mark.parametrize(
    "attention",
    [
        "dense",
        pytest.param("magicpig_tokens", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_what_lists_no_blocks_has_a_slot_for_each(token_ids, attention):
    cache = sj.CacheConfig(kind="offload", layer0="offload")
    lm = sj.load("tiny", attention=attention, storage="stacked", cache=cache)
    out = sj.generate(lm, [token_ids(90)], max_new_tokens=2, ignore_eos=True)
    assert re.search(r"device_blocks: (\d+) of \1 fit", out.stats.policy)
    assert out.stats.offload is not None
    assert out.stats.offload.fetched_bytes == 0
