"""InfLLM-style selection: representatives and lists against NumPy."""

import numpy as np
import pytest
import selector_cases as cases
from selector_cases import KINDS, SPARSE

from sparda_jax.sparse.selectors.infllm import InfLLM

BLOCKS = 16
INFLLM = InfLLM(tokens=3)


def _representatives(layer):
    """By the definition, float64: [B, K, M, H] of the blocks that have left the last
    local window."""
    size, local = SPARSE.block_size, SPARSE.local_blocks
    grouped, k = layer.grouped().astype(float), layer.k.astype(float)
    batch, length, kv_heads, dim = k.shape
    final = length // size - local
    means = np.zeros((batch, kv_heads, final, dim))
    for row in range(batch):
        for head in range(kv_heads):
            votes = np.zeros(length)
            for token in range(length):
                least = max(0, (token // size - local) * size)
                keys = k[row, least : token + 1, head]
                logits = grouped[row, token, head] @ keys.T * dim**-0.5
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                votes[least : token + 1] += weights.sum(0)
            for block in range(final):
                tokens = np.arange(block * size, (block + 1) * size)
                best = tokens[np.argsort(-votes[tokens], kind="stable")]
                means[row, head, block] = k[row, best[: INFLLM.tokens], head].mean(0)
    return means


@pytest.mark.parametrize("kind", KINDS)
def test_representatives_and_lists_are_the_definition_s(kind):
    layer = cases.draw_layer(kind)
    index = cases.make_index(INFLLM, layer, [layer.length], BLOCKS)
    means = _representatives(layer)
    final = means.shape[2]
    got = np.asarray(index["representatives"].means[0, :, :, :final])
    np.testing.assert_allclose(got, means, atol=1e-4)
    where = slice(600, None, 5)
    tile = cases.tile_of(layer, index, where, BLOCKS)
    scores = cases.scored(INFLLM, tile)
    want = np.einsum("btkgh,bkmh->bktm", layer.grouped()[:, where], means)
    np.testing.assert_allclose(scores[..., :final], want, rtol=1e-4, atol=1e-3)
    lists = cases.listed(INFLLM, tile)
    positions = np.arange(layer.length)[where]
    assert cases.listed_sets(lists) == cases.best_sets(scores, positions, SPARSE)


@pytest.mark.slow
def test_representatives_made_piece_by_piece_are_those_of_the_whole():
    layer = cases.draw_layer("random", length=400)
    whole = cases.make_index(INFLLM, layer, [400], 8)["representatives"]
    pieces = [50, 128, 100, *[1] * 60, 62]
    kept = cases.make_index(INFLLM, layer, pieces, 8)["representatives"]
    final = 400 // SPARSE.block_size - SPARSE.local_blocks
    a, b = (np.asarray(x.means)[:, :, :, :final] for x in (whole, kept))
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(whole.votes, kept.votes, atol=1e-4)
