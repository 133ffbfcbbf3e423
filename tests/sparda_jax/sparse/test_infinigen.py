"""InfiniGen-style selection: partial keys and lists against NumPy; the next layer's
list from a real model's hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import KINDS, SPARSE

from sparda_jax.models.block import before_attention
from sparda_jax.models.presets import get_preset
from sparda_jax.models.rope import model_rope, rope_cos_sin_at
from sparda_jax.models.weights import random_decoder
from sparda_jax.sparse.selectors.infinigen import InfiniGen

BLOCKS = 16
INFINIGEN = InfiniGen(ratio=0.4, window=24)


def _oracle_scores(layer, window, axes, queries):
    """By the definition, float64: block scores [B, K, T, M] for queries [B,T,K,G,H]."""
    batch, length, kv_heads, _ = layer.k.shape
    size = SPARSE.block_size
    out = np.full((batch, kv_heads, queries.shape[1], BLOCKS), -np.inf)
    for row in range(batch):
        for head in range(kv_heads):
            last = layer.grouped()[row, length - window :, head].astype(float)
            _, _, basis = np.linalg.svd(last.mean(1), full_matrices=True)
            skewed = np.abs(last @ basis.T).sum((0, 1))
            chosen = basis[np.argsort(-skewed, kind="stable")[:axes]].T
            keys = layer.k[row, :, head].astype(float) @ chosen
            asked = queries[row, :, head].astype(float).sum(1) @ chosen
            scores = asked @ keys.T
            for block in range(-(-length // size)):
                part = scores[:, block * size : (block + 1) * size]
                out[row, head, :, block] = part.max(-1)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_the_definition_s(kind):
    layer = cases.draw_layer(kind)
    index = cases.make_index(INFINIGEN, layer, [layer.length], BLOCKS)
    asked = np.random.default_rng(3).standard_normal((2, 1, 4, 8)).astype(np.float32)
    grouped = asked.reshape(2, 1, 2, 2, 8)
    axes = index["partial_keys"].axes.shape[-1]
    want = _oracle_scores(layer, INFINIGEN.window, axes, grouped)
    tile = cases.tile_of(
        layer,
        index,
        slice(-1, None),
        BLOCKS,
        decoding=True,
        forecast=jnp.asarray(asked),
    )
    tile = dataclasses.replace(tile, q=None)
    got = cases.scored(INFINIGEN, tile)
    whole = layer.length // SPARSE.block_size
    # The axes are eigenvectors of a float32 second moment.
    np.testing.assert_allclose(
        got[..., :whole], want[..., :whole], rtol=1e-3, atol=2e-3
    )
    lists = cases.listed(INFINIGEN, tile)
    assert cases.listed_sets(lists) == cases.best_sets(want, [layer.length - 1], SPARSE)


def test_each_row_has_its_own_channels_and_pieces_are_the_whole():
    layer = cases.draw_layer("adversarial", length=300)
    whole = cases.make_index(INFINIGEN, layer, [290, *[1] * 10], 6)["partial_keys"]
    pieces = cases.make_index(INFINIGEN, layer, [130, 150, 10, *[1] * 10], 6)[
        "partial_keys"
    ]
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for row in range(2):
        mine = dataclasses.replace(
            layer, **{n: getattr(layer, n)[row : row + 1] for n in ("q", "k", "bias")}
        )
        alone = cases.make_index(INFINIGEN, mine, [290, *[1] * 10], 6)["partial_keys"]
        np.testing.assert_allclose(alone.keys[:, 0], whole.keys[:, row], atol=1e-4)


@pytest.mark.parametrize("storage", ["stacked", "per_layer"])
def test_the_speculated_query_is_the_next_layer_s_projection(storage):
    """With every kind of it: a bias (Qwen2), norms of heads (Qwen3)."""
    base = get_preset("tiny").model
    config = dataclasses.replace(base, attention_bias=True, qk_norm=True)
    model = random_decoder(config, "float32", storage=storage)
    x = jax.random.normal(jax.random.key(1), (2, 3, config.hidden_size))
    rope = rope_cos_sin_at(model_rope(config, 64), jnp.arange(6).reshape(2, 3))
    weights = INFINIGEN.next_query_weights(model, 1)
    got = INFINIGEN.next_query(weights, x, rope)
    layers = model.layers
    layer = (
        layers[1] if storage == "per_layer" else jax.tree.map(lambda a: a[1], layers)
    )
    # The layer's own queries of an input that its norm leaves at x.
    scaled = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.rms_norm_eps)
    want = before_attention(layer, config, x, rope)
    normed = scaled * layer.attention_norm[...]
    got_normed = INFINIGEN.next_query(weights, normed, rope)
    np.testing.assert_allclose(got_normed, want.q, atol=1e-4)
    assert got.shape == want.q.shape
