"""Forecast heads that make several queries for each kv head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checkpoint.forecast import (
    ForecastWeights,
    load_forecast,
    save_forecast,
)
from sparda_jax.config import CacheConfig, SparseConfig
from sparda_jax.models.forecast import heads_from_query
from sparda_jax.models.low_rank import factor_heads
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import from_query_heads
from sparda_jax.sparse.selection import SelectionTile, sorted_blocks
from sparda_jax.sparse.selectors import get_selector

TINY = get_preset("tiny").model
SPARSE = SparseConfig(local_blocks=1, block_budget=5)


def _summed_softmax_lists(queries, windows, positions, length):
    """NumPy: softmaxes of finished past windows, summed, pooled; the best blocks."""
    tokens, _, dim = queries.shape
    kv_heads, count, _ = windows.shape
    group = queries.shape[1] // kv_heads
    last = np.arange(count) * SPARSE.kernel_stride + SPARSE.kernel_size - 1
    lists = np.full((kv_heads, tokens, SPARSE.block_budget), -1)
    for head in range(kv_heads):
        for token, position in enumerate(positions):
            seen = (last <= position) & (last < length)
            total = np.zeros(count)
            for one in queries[token, head * group : (head + 1) * group]:
                logits = windows[head] @ one * dim**-0.5
                weights = np.where(seen, np.exp(logits - logits.max()), 0.0)
                total += weights / max(weights.sum(), 1e-30)
            each = SPARSE.windows_per_block
            own = position // SPARSE.block_size
            scores = [
                np.inf
                if block < SPARSE.init_blocks or own - block <= SPARSE.local_blocks
                else total[max(each * block - 1, 0) : each * (block + 1)].max()
                for block in range(own + 1)
            ]
            best = np.argsort(-np.asarray(scores), kind="stable")
            best = sorted(best[: SPARSE.block_budget])
            lists[head, token, : len(best)] = best
    return lists


@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("decoding", [False, True])
def test_lists_are_those_of_the_summed_softmaxes(queries, decoding):
    rng = np.random.default_rng(queries)
    tokens = 1 if decoding else 24
    positions = np.arange(1280 - tokens, 1280)
    windows = rng.standard_normal((2, 80, 16)).astype(np.float32)
    forecast = rng.standard_normal((tokens, 2 * queries, 16)).astype(np.float32) * 2
    tile = SelectionTile(
        q=None,
        forecast=jnp.asarray(forecast)[None],
        positions=jnp.asarray(positions)[None],
        length=jnp.full((1,), 1280),
        index={"key_means": _Windows(jnp.asarray(windows)[None])},
        num_blocks=20,
        decoding=decoding,
    )
    config = dataclasses.replace(TINY, forecast_queries=queries)
    select = get_selector("sparda").select
    lists = jax.jit(lambda tile: select(tile, config, SPARSE, "xla"))(tile)
    expected = _summed_softmax_lists(forecast, windows, positions, 1280)
    np.testing.assert_array_equal(sorted_blocks(lists)[0], expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Windows:
    windows: jnp.ndarray


def test_as_many_queries_as_heads_are_the_query_heads():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((5, 6 * 4)), jnp.float32)
    np.testing.assert_array_equal(heads_from_query(weights, 2, 4, 3), weights)
    two = heads_from_query(weights, 2, 4, 2).reshape(5, 2, 2, 4)
    heads = np.asarray(weights).reshape(5, 2, 3, 4)
    np.testing.assert_array_equal(two[:, :, 0], heads[:, :, 0])
    np.testing.assert_allclose(two[:, :, 1], heads[:, :, 1:].mean(2), rtol=1e-6)


def _weights(queries):
    rng = np.random.default_rng(3)
    shape = (TINY.num_layers, 2 * queries * 16, 64)
    matrices = rng.standard_normal(shape).astype(np.float32)
    return ForecastWeights(matrices[1:], matrices[0], "base", SPARSE, queries=queries)


def test_files_say_how_many_queries(tmp_path):
    path = tmp_path / "heads.safetensors"
    for queries in (1, 2, 4):
        weights = _weights(queries)
        save_forecast(path, weights, base_name="tiny")
        held = load_forecast(path, config=TINY, fingerprint="base", sparse=SPARSE)
        assert held.queries == queries
        assert held.info["version"] == ("1" if queries == 1 else "2")
        np.testing.assert_array_equal(held.future, weights.future)
        np.testing.assert_array_equal(held.current, weights.current)
    fewer = dataclasses.replace(TINY, num_heads=2)
    with pytest.raises(sj.CheckpointError, match="queries = 4, allowed: at most 1"):
        load_forecast(path, config=fewer, fingerprint=None, sparse=None)


def test_low_rank_files(tmp_path):
    """Exact for scaled query weights, and where the rank is full; better than
    dropping directions by their weights alone between."""
    lm = sj.load("tiny", storage="stacked")
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((TINY.num_layers, 300, 64)) * np.geomspace(4, 0.1, 64)
    square = np.einsum("lid,lie->lde", inputs, inputs)
    for queries in (1, 4):
        own = from_query_heads(lm.model, queries)
        outputs = own[0].shape[1]
        gain = rng.uniform(0.5, 2, (TINY.num_layers, 64))
        scaled = gain[..., None] * np.stack(own)
        heads = scaled + rng.standard_normal((TINY.num_layers, 64, outputs))
        low = factor_heads(scaled, own, square, 1)
        np.testing.assert_allclose(np.stack(low.whole(own)), scaled, atol=1e-4)
        low = factor_heads(heads, own, square, outputs)
        np.testing.assert_allclose(np.stack(low.whole(own)), heads, atol=1e-3)
        low = factor_heads(heads, own, square, 3)
        base = low.gain[..., None] * np.stack(own)
        left, sizes, right = np.linalg.svd(heads - base)
        cut = base + (left[..., :3] * sizes[:, None, :3]) @ right[:, :3]
        misses = [inputs @ (x - heads) for x in (np.stack(low.whole(own)), cut, base)]
        ours, plain, none = (float(np.square(x).mean()) for x in misses)
        assert ours < 0.9 * plain and ours < 0.7 * none
        matrices = np.swapaxes(np.stack(low.whole(own)), 1, 2)
        weights = ForecastWeights(
            matrices[1:], matrices[0], "base", SPARSE, queries=queries, low_rank=low
        )
        path = tmp_path / f"{queries}.safetensors"
        save_forecast(path, weights, base_name="tiny")
        read = functools.partial(
            load_forecast, path, config=TINY, fingerprint="base", sparse=SPARSE
        )
        held = read(model=lm.model)
        assert (held.queries, held.info["rank"]) == (queries, 3)
        np.testing.assert_array_equal(held.future, weights.future)
        np.testing.assert_array_equal(held.current, weights.current)
        with pytest.raises(sj.CheckpointError, match="with the model alone"):
            read()


def test_planner_counts_them():
    one, all_heads = TINY, dataclasses.replace(TINY, forecast_queries=4)
    sparda = get_selector("sparda")
    assert sparda.scored_heads(one, SPARSE, decoding=True) == 2
    assert sparda.scored_heads(all_heads, SPARSE, decoding=True) == 8
    assert sparda.ahead_bytes(all_heads, 9, 2) == 4 * sparda.ahead_bytes(one, 9, 2)
    with pytest.raises(sj.ConfigError, match="forecast_queries"):
        dataclasses.replace(TINY, forecast_queries=5)


@pytest.mark.slow
@pytest.mark.long  # `test_late_heads` has two queries
def test_offloaded_equals_resident(token_ids, lm):
    """Prefill, decode and look-ahead with a query for each query head."""
    plain = lm
    model = plain.model.with_forecast(from_query_heads(plain.model, 4))
    lm = dataclasses.replace(plain, model=model, config=model.config)
    prompts = [token_ids(600), token_ids(130, seed=1)]
    hot = {"temperature": 1.5, "ignore_eos": True, "max_new_tokens": 80}
    expected = sj.generate(lm, prompts, **hot)
    assert np.any(sj.forward(lm, prompts[0]) != sj.forward(plain, prompts[0]))
    cache = CacheConfig(
        kind="offload", device_blocks=None, route="dynamic_slice", recall_every=8
    )
    out = sj.generate(sj.with_attention(lm, "sparda", cache=cache), prompts, **hot)
    assert out.tokens == expected.tokens
    # Layer 0's heads are its own query weights, so it finds all of its choice.
    assert out.stats.offload.recall > 0.5
