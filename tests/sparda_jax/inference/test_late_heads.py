"""Forecast heads that read what a layer's MLP reads: behind its attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.cache.settings import TileState
from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.atomic import write_safetensors
from sparda_jax.checkpoint.export import reference_tensors
from sparda_jax.checkpoint.forecast import (
    ForecastWeights,
    load_forecast,
    save_forecast,
)
from sparda_jax.checkpoint.hf import read_safetensors
from sparda_jax.config import CacheConfig, SparseConfig
from sparda_jax.inference.generate import new_state
from sparda_jax.inference.shapes import Shapes
from sparda_jax.inference.stack import start_stack
from sparda_jax.models.block import add_attention, add_mlp, before_attention
from sparda_jax.models.decoder import embed
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.layers import rms_norm
from sparda_jax.models.presets import get_preset
from sparda_jax.models.rope import model_rope, rope_cos_sin_at
from sparda_jax.models.weights import from_query_heads
from sparda_jax.planning.auto import offload_settings
from sparda_jax.sparse.selectors import get_selector

TINY = get_preset("tiny").model
SPARSE = SparseConfig(local_blocks=2, block_budget=6)


def test_files_say_what_heads_read(tmp_path):
    path = tmp_path / "heads.safetensors"
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((TINY.num_layers, 32, 64)).astype(np.float32)
    weights = ForecastWeights(heads[1:], heads[0], "base", SPARSE, reads="attended")
    save_forecast(path, weights, base_name="tiny")
    held = load_forecast(path, config=TINY, fingerprint="base", sparse=SPARSE)
    assert (held.reads, held.info["version"]) == ("attended", "3")
    np.testing.assert_array_equal(held.future, weights.future)
    with pytest.raises(sj.ConfigError, match="read what a layer's MLP reads"):
        reference_tensors(held)
    plain = dataclasses.replace(weights, reads="input")
    save_forecast(path, plain, base_name="tiny")
    assert read_safetensors(path)[1]["version"] == "1"  # as before
    metadata = {"format": "sparda-forecast", "version": "3", "queries": "1"}
    write_safetensors(path, {layout.CURRENT: heads[0]}, metadata | {"reads": "all"})
    with pytest.raises(sj.CheckpointError, match="reads = 'all', allowed: 'input'"):
        load_forecast(path, config=TINY, fingerprint="base", sparse=SPARSE)


def test_only_forecast_heads_are_asked_late():
    late = dataclasses.replace(TINY, forecast_reads="attended")
    assert get_selector("sparda").asks_late(late)
    assert not get_selector("sparda").asks_late(TINY)
    assert not get_selector("infinigen").asks_late(late)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reads", [pytest.param("input", marks=pytest.mark.long), "attended"]
)
def test_the_first_lists_of_two_layers_ahead_are_made_of_what_heads_read(lm, reads):
    """No layer makes layer 1's: it is of layer 0's input, in the norm of its head."""
    model = lm.model.with_forecast(from_query_heads(lm.model), reads)
    cache = CacheConfig(
        kind="offload",
        device_blocks=None,
        layers_ahead=2,
        prefetch="none",
        route="dynamic_slice",
    )
    settings = dataclasses.replace(
        lm.settings, config=model.config, offload=offload_settings(cache, lm.selector)
    )
    shapes = Shapes(prompt=0, new=1, capacity=640, tile=128)
    kept = new_state(model, settings, 1, shapes, cache).cache
    rope = rope_cos_sin_at(model_rope(model.config, 640), jnp.asarray([[600]]))
    tile = TileState(
        start=jnp.asarray([600]),
        count=jnp.asarray([1]),
        length=jnp.asarray([601]),
        rope_cos_sin=rope,
        num_blocks=kept.num_blocks,
        decoding=True,
    )
    tokens = jnp.asarray([[7]])
    carry = start_stack(model, kept, tokens, tile, settings, capture=False)
    (made,) = carry.activations.later
    h, norms = embed(model, tokens, jnp.float32), {}
    norms["input"] = model.layers.attention_norm[0]
    norms["attended"] = model.layers.mlp_norm[0]
    made_of = {
        kind: project_forecast(
            rms_norm(h, norm, model.config.rms_norm_eps), model.forecast_head(1), rope
        )
        for kind, norm in norms.items()
    }
    wanted = made_of.pop(reads)
    (other,) = made_of.values()
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(made - other)) > 1e-3 * np.max(np.abs(wanted))


def _late(lm: sj.LanguageModel, queries: int = 1) -> sj.LanguageModel:
    heads = from_query_heads(lm.model, queries)
    model = lm.model.with_forecast(heads, "attended")
    return dataclasses.replace(lm, model=model, config=model.config)


@pytest.mark.slow
def test_lists_are_those_of_the_rule(runner, token_ids):
    """Layer 1's lists by hand: layer 0 reads all, its MLP's input makes the query."""
    run = runner("sparda", block_budget=(12, 6))
    model = run.model.with_forecast(from_query_heads(run.model), "attended")
    settings = dataclasses.replace(run.settings, config=model.config)
    run = dataclasses.replace(run, model=model, settings=settings)
    config, ids, tokens = model.config, token_ids(500), 500
    lists = run.prefill(run.empty(1), [ids], [0]).blocks[1, 0]

    layers = [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(2)]
    rope = rope_cos_sin_at(model_rope(config, tokens), jnp.arange(tokens)[None])
    h = embed(model, jnp.asarray([ids]), jnp.float32)
    _, q, k, v, _ = before_attention(layers[0], config, h, rope)
    groups = q.reshape(tokens, config.num_kv_heads, -1, config.head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", groups, k[0]) * config.head_dim**-0.5
    seen = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    out = jnp.einsum("kgts,skh->tkgh", weights, v[0]).reshape(1, tokens, -1)
    h, read = add_attention(layers[0], config, h, out)
    forecast = project_forecast(read, model.forecast_head(1), rope)[0]
    h = add_mlp(layers[0], config, h, read)
    k = np.asarray(before_attention(layers[1], config, h, rope).k[0])
    windows = np.stack([k[i : i + 32].mean(0) for i in range(0, tokens - 31, 16)])
    for t in range(450, tokens):
        found = np.einsum("kh,wkh->kw", np.asarray(forecast[t]), windows)
        found = found[:, : max(0, (t - 31) // 16 + 1)]
        block, own = np.arange(8), t // 64
        for head, row in enumerate(found):
            pooled = [
                max(row[max(0, 4 * b - 1) : 4 * b + 4], default=-1e9) for b in block
            ]
            forced = (block == 0) | ((block >= own - 2) & (block <= own))
            order = np.where(forced, np.inf, np.where(block > own, -np.inf, pooled))
            wanted = np.sort(np.argsort(-order, kind="stable")[:6])
            listed = lists[head, t]
            np.testing.assert_array_equal(np.sort(listed[listed >= 0]), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage", ["stacked", pytest.param("per_layer", marks=pytest.mark.long)]
)
def test_offloaded_equals_resident(token_ids, storage):
    """Every way to look ahead behind a layer's attention gives the resident tokens."""
    plain = sj.load(
        "tiny",
        attention="sparda",
        forecast="from_query",
        sparse=SPARSE,
        storage=storage,
    )
    lm = _late(plain, queries=2)
    prompts = [token_ids(600), token_ids(130, seed=1)]
    hot = {"temperature": 1.5, "ignore_eos": True, "max_new_tokens": 70}
    expected = sj.generate(lm, prompts, **hot)
    assert np.any(sj.forward(lm, prompts[0]) != sj.forward(plain, prompts[0]))
    routes = ["dynamic_slice", "host_loop"] if storage == "stacked" else ["host_loop"]
    for route in routes:
        cache = CacheConfig(
            kind="offload", device_blocks=None, route=route, prefetch="lookahead"
        )
        out = sj.generate(sj.with_attention(lm, "sparda", cache=cache), prompts, **hot)
        assert out.tokens == expected.tokens, route
        assert out.stats.offload.fetched_bytes > 0
