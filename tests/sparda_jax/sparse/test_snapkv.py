"""SnapKV-style selection: exactly the set that NumPy says, and never more of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import KINDS, SPARSE

from sparda_jax.sparse.selectors.snapkv import SnapKV

BLOCKS = 16
SNAPKV = SnapKV(window=20)


def _votes(layer, prompt, window, pool=5):
    """By the definition, float64: pooled votes of every prefix token [B, K, S]."""
    q = layer.grouped()[:, prompt - window : prompt].astype(float)
    k = layer.k[:, :prompt].astype(float)
    logits = np.einsum("bwkgh,bskh->bkgws", q, k) * k.shape[-1] ** -0.5
    rows = np.arange(prompt - window, prompt)
    logits = np.where(np.arange(prompt) <= rows[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    votes = weights.sum(3)[..., : prompt - window]
    padded = np.pad(votes, [(0, 0)] * 3 + [(pool // 2, pool // 2)])
    pooled = np.stack([padded[..., i : i + votes.shape[-1]] for i in range(pool)])
    return pooled.mean(0).mean(2)


def _sets(layer, index, position):
    """What a decode step at a position lists."""
    here = dataclasses.replace(
        layer, q=layer.q[:, : position + 1], k=layer.k[:, : position + 1]
    )
    tile = cases.tile_of(here, index, slice(-1, None), BLOCKS, decoding=True)
    return cases.listed_sets(cases.listed(SNAPKV, tile))


@pytest.mark.parametrize("kind", KINDS)
def test_the_set_is_the_definition_s_and_only_shrinks(kind):
    layer, prompt, size = (
        cases.draw_layer(kind, length=900),
        700,
        SPARSE.block_size,
    )
    index = cases.make_index(SNAPKV, layer, [prompt], BLOCKS)
    votes = _votes(layer, prompt, SNAPKV.window)
    scores = np.zeros((*votes.shape[:2], 1, BLOCKS))
    votes = np.pad(votes, ((0, 0), (0, 0), (0, -votes.shape[-1] % size)))
    votes = votes.reshape(*votes.shape[:2], -1, size).sum(-1)
    scores[:, :, 0, : votes.shape[-1]] = votes
    np.testing.assert_allclose(
        index["votes"].scores[0, :, :, : votes.shape[-1]], votes, atol=1e-5
    )
    since = np.arange(BLOCKS) >= (prompt - SNAPKV.window) // size
    scores = np.where(since, 1e3 + np.arange(BLOCKS), scores)
    kept = _sets(layer, index, prompt)
    assert kept == cases.best_sets(scores, [prompt], SPARSE)
    ends = -(-prompt // size)
    for position in (prompt + 70, prompt + 150, 899):
        now = _sets(layer, index, position)
        assert now == cases.best_sets(scores, [position], SPARSE)
        for before, after in zip(kept, now, strict=True):
            assert {b for b in after if b < ends} <= before


def test_a_prompt_in_pieces_votes_as_a_whole_one_and_decode_changes_nothing():
    layer = cases.draw_layer("random", length=300)
    whole = cases.make_index(SNAPKV, layer, [290, *[1] * 10], 6)["votes"]
    pieces = cases.make_index(SNAPKV, layer, [130, 150, 10, *[1] * 10], 6)["votes"]
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)
    first = cases.make_index(SNAPKV, layer, [290], 6)["votes"]
    np.testing.assert_array_equal(first.scores, whole.scores)


def test_a_prompt_shorter_than_its_window_is_kept_whole():
    layer = cases.draw_layer("random", length=12)
    votes = cases.make_index(SNAPKV, layer, [12], 6)["votes"]
    assert not np.any(votes.scores) and not np.any(votes.kept_from)
    assert jnp.isfinite(votes.queries).all()
