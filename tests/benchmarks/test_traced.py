"""The mapping of a trace onto a benchmark: shares, reuse, unions, what is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trace_cases import drifting_trace

from benchmarks.traced import (
    TRACES,
    check_room,
    install,
    map_trace,
    prefill_lists,
    traced_scores,
    traced_selector,
)
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import CacheConfig, ConfigError, SparseConfig
from sparda_jax.inference.decode import decode_step
from sparda_jax.inference.generate import new_state
from sparda_jax.inference.shapes import Shapes
from sparda_jax.models.presets import get_preset
from sparda_jax.models.rope import model_rope
from sparda_jax.models.weights import random_decoder
from sparda_jax.planning.auto import offload_settings
from sparda_jax.planning.traces import read_trace, slot_misses
from sparda_jax.sparse.selectors import get_selector

SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def trace():
    return drifting_trace(layers=3, tokens=12000, prefill=100, decode=156)


def unions(lists, neighbours):
    """Blocks that neighbours list together, in lists."""
    count = lists.shape[-2] // neighbours
    size = lists[..., 0, :].sum(-1).mean()
    groups = lists[..., : count * neighbours, :].reshape(
        *lists.shape[:-2], count, neighbours, -1
    )
    return groups.any(-2).sum(-1).mean() / size


def shares(lists, scored):
    """New share of a token's list, and misses of caches of 1, 2, 3 and 4 lists."""
    flat = lists.reshape(-1, *lists.shape[-2:])
    new = (flat[:, 1:] & ~flat[:, :-1]).sum(-1).mean() / scored
    never_own = np.full(flat.shape[1], -1)
    # A block that is nobody's own: every miss is counted.
    padded = np.concatenate([flat, np.zeros_like(flat[..., :1])], axis=-1)
    misses = slot_misses(padded, never_own, [size * scored for size in SIZES])
    return new, misses[:, flat.shape[1] // 4 :].mean((0, 1)) / scored


def check_kept(trace, layers, rows, kv_heads, scored):
    chosen = trace.chosen
    want_new, want_misses = shares(chosen, trace.scored)
    mapped = map_trace(
        trace,
        layers=layers,
        rows=rows,
        kv_heads=kv_heads,
        scored=scored,
        tokens=chosen.shape[2],
    )
    lists = mapped.listed
    assert lists.shape[:4] == (layers, rows, kv_heads, chosen.shape[2])
    assert (lists.sum(-1) == scored).all()
    new, misses = shares(lists, scored)
    assert new == pytest.approx(want_new, rel=0.1)
    np.testing.assert_allclose(misses, want_misses, rtol=0.15, atol=0.005)
    for neighbours in (16, 64):
        want = unions(chosen, neighbours)
        assert unions(lists, neighbours) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("scored", [12, 24, 7, 17, 31])
def test_the_mapping_keeps_shares_reuse_and_unions(trace, scored):
    check_kept(trace, layers=6, rows=3, kv_heads=2, scored=scored)


_QUICK = ("qwen2.5-coder-0.5b_30k_prose_infllm_v2", "smollm2-135m_4k_code_sparda")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=() if path.stem in _QUICK else pytest.mark.slow,
        )
        for path in sorted(TRACES.glob("*.npz"))
    ],
)
def test_what_is_published_maps_as_well(path):
    trace = read_trace(path)
    check_kept(trace, layers=len(trace.listed), rows=1, kv_heads=2, scored=62)


def test_traces_are_small_and_of_both_texts():
    paths = list(TRACES.glob("*.npz"))
    assert sum(path.stat().st_size for path in paths) <= 2 * 10**6
    found = [read_trace(path) for path in paths]
    assert all(trace.decode >= 256 and trace.prefill >= 128 for trace in found)
    kinds = {(x.model, x.text, x.attention) for x in found}
    models = {model for model, _, _ in kinds}
    assert kinds >= {(m, t, "infllm_v2") for m in models for t in ("prose", "code")}


def test_a_walk_comes_back_without_a_jump(trace):
    mapped = map_trace(trace, layers=1, rows=1, kv_heads=1, scored=20)
    lists = mapped.listed[0, 0, 0]
    around = np.concatenate([lists[-1:], lists])
    new = (around[1:] & ~around[:-1]).sum(-1)
    assert new.max() <= 2 * trace.scored and new[0] <= new.max()
    assert len(lists) == 2 * (trace.chosen.shape[2] - 1)


SPARSE = SparseConfig(local_blocks=2, block_budget=16)


def test_what_is_scored_best_is_the_list(trace):
    mapped = map_trace(trace, layers=2, rows=2, kv_heads=2, scored=12, tokens=50)
    context = 64 * (mapped.places + 40)
    room = check_room(mapped, context, SPARSE)
    blocks = mapped.blocks(room, SPARSE.init_blocks)
    assert len(set(blocks.tolist())) == mapped.places
    at = np.array([[3, 4], [7, 49]])
    scores = traced_scores(
        jnp.asarray(mapped.bits[1]),
        mapped.places,
        jnp.asarray(at),
        jnp.int32(context // 64),
        context // 64 + 1,
        SPARSE,
        steady=True,
    )
    for row, head, token in np.ndindex(2, 2, 2):
        want = blocks[mapped.listed[1, row, head, at[row, token]]]
        mine = np.asarray(scores[row, head, token])
        np.testing.assert_array_equal(np.flatnonzero(mine > 0), np.sort(want))
        assert len(np.unique(mine)) == len(mine)


def test_prefill_lists_have_the_traces_unions(trace):
    mapped = map_trace(trace, layers=1, rows=1, kv_heads=2, scored=12)
    tokens, start = 512, 64 * (mapped.places * 2)
    lists = prefill_lists(
        mapped, 0, tokens=tokens, sparse=SPARSE, start=start, tile=256
    )
    assert lists.shape == (1, 2, tokens, 16) and (lists >= 0).all()
    own = (start + np.arange(tokens)) // 64
    assert (lists.max(-1) == own).all()
    held = np.zeros((1, 2, tokens, own[-1] + 1), bool)
    np.put_along_axis(held, lists, True, axis=-1)
    want = np.concatenate([trace.listed[0, :], trace.listed[0, :, ::-1]], axis=1)
    for neighbours in (16, 64):
        assert unions(held, neighbours) == pytest.approx(
            unions(want, neighbours), rel=0.15
        )


def test_early_tokens_list_all_that_there_is(trace):
    mapped = map_trace(trace, layers=1, rows=1, kv_heads=1, scored=12)
    lists = prefill_lists(mapped, 0, tokens=2048, sparse=SPARSE, tile=512)
    own = np.arange(2048) // 64
    held = (lists >= 0).sum(-1)[0, 0]
    np.testing.assert_array_equal(held, np.minimum(own + 1, 16))
    assert (lists.max(-1)[0, 0] == own).all()


def test_a_context_that_is_too_short_is_refused(trace):
    mapped = map_trace(trace, layers=1, rows=1, kv_heads=1, scored=40)
    with pytest.raises(ConfigError, match=r"context=4096 .* at least \d+ tokens"):
        check_room(mapped, 4096, SPARSE)
    with pytest.raises(ConfigError, match="scored=0"):
        map_trace(trace, layers=1, rows=1, kv_heads=1, scored=0)


def test_rows_are_not_in_step(trace):
    mapped = map_trace(trace, layers=1, rows=8, kv_heads=2, scored=12, tokens=64)
    lists = mapped.listed[0].reshape(16, 64, -1)
    new = (lists[:, 1:] & ~lists[:, :-1]).sum(-1)
    # Two rows in step would list as many new blocks at every step.
    same = [(a == b).mean() for i, a in enumerate(new) for b in new[:i]]
    assert max(same) < 0.7


def test_who_verifies_chooses_the_same_lists(trace):
    mapped = map_trace(trace, layers=2, rows=1, kv_heads=2, scored=12, tokens=4)
    selector = traced_selector(get_selector("sparda"), mapped, context=64 * 300)
    own = selector.by_own_query()
    assert own is not selector and not own.needs_forecast
    assert (own.places, own.tokens) == (mapped.places, mapped.tokens)
    config = get_preset("tiny").model
    assert own.indices(config) == selector.indices(config)
    assert own.by_own_query() is own


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["offload", pytest.param("resident", marks=pytest.mark.long)]
)
def test_a_step_attends_to_what_the_trace_lists(trace, kind):
    """Layers, rows and heads each get their own lists, whatever the scores say."""
    preset = get_preset("tiny")
    config = dataclasses.replace(preset.model, num_layers=3)
    context, cache = 64 * 300, CacheConfig(kind=kind)
    mapped = map_trace(
        trace, layers=3, rows=2, kv_heads=config.num_kv_heads, scored=12, tokens=4
    )
    selector = traced_selector(get_selector("infllm_v2"), mapped, context=context)
    offload = offload_settings(cache, selector) if kind == "offload" else None
    settings = LayerSettings(config, SPARSE, selector, offload=offload)
    model = random_decoder(config, "float32", forecast=False)
    shapes = Shapes(prompt=0, new=4, capacity=context + 64, tile=64)
    state = new_state(model, settings, 2, shapes, cache)
    held = install(state.cache, mapped)
    rope = model_rope(config, context + 64)

    @jax.jit
    def steps(cache):
        lists = []
        for step in range(2):
            carry = decode_step(
                model,
                cache,
                jnp.full((2,), 5),
                jnp.full((2,), context + step),
                jnp.ones((2,), bool),
                rope,
                settings,
                capture=True,
            )
            cache = carry.cache
            lists.append(carry.blocks)
        return jnp.concatenate(lists, axis=3)

    found = np.asarray(steps(held))
    own, room = context // 64, check_room(mapped, context, SPARSE)
    blocks = mapped.blocks(room, SPARSE.init_blocks)
    for layer, row, head, step in np.ndindex(found.shape[:4]):
        want = blocks[mapped.listed[layer, row, head, step]]
        want = {0, own - 2, own - 1, own, *want.tolist()}
        assert set(found[layer, row, head, step].tolist()) == want
    with pytest.raises(ConfigError, match="lists="):
        install(state.cache, map_trace(trace, layers=2, rows=2, kv_heads=2, scored=12))
