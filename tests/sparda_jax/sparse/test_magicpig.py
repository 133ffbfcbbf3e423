"""MagicPIG-style selection against NumPy, and its sampling against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
import selector_cases as cases
from selector_cases import CONFIG, KINDS, SPARSE

from sparda_jax.sparse.indices.signatures import directions, hash_codes
from sparda_jax.sparse.selectors.magicpig import MagicPIG
from sparda_jax.sparse.selectors.magicpig_tokens import MagicPIGTokens

BLOCKS = 12
PIG = MagicPIG(bits=4, tables=30, seed=3)


def _codes(x):
    """By the definition: the signs along random directions, as bits [*, tables]."""
    planes = directions(x.shape[-1], PIG.bits, PIG.tables, PIG.seed)
    bits = (x.astype(np.float64) @ planes > 0).reshape(*x.shape[:-1], PIG.tables, -1)
    return (bits * 2 ** np.arange(PIG.bits)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_the_definition_s(kind):
    layer, prompt = cases.draw_layer(kind, length=640), 600
    pieces = [prompt, *[1] * 40]
    index = cases.make_index(PIG, layer, pieces, BLOCKS)
    centre = layer.k[:, :prompt].astype(float).mean(1, keepdims=True)
    keys = np.moveaxis(_codes(layer.k - centre), 1, 2)  # B K S tables
    got = np.asarray(index["signatures"].codes[0, :, :, : layer.length])
    # A key on a plane may be rounded to either side.
    assert (got == keys).mean() > 0.999
    tile = cases.tile_of(layer, index, slice(-1, None), BLOCKS, decoding=True)
    asked = _codes(layer.grouped()[:, -1])  # B K G tables
    equal = (asked[:, :, :, None] == got[:, :, None]).sum(-1)
    scores = np.zeros((2, 2, 1, BLOCKS))
    by_block = (equal >= 2).reshape(2, 2, 2, -1, SPARSE.block_size)
    scores[:, :, 0, : by_block.shape[3]] = by_block.sum((2, 4))
    lists = cases.listed(PIG, tile)
    assert cases.listed_sets(lists) == cases.best_sets(
        scores, [layer.length - 1], SPARSE
    )


def test_a_prompt_in_pieces_has_the_codes_of_the_whole():
    layer = cases.draw_layer("random", length=300)
    whole = cases.make_index(PIG, layer, [290, *[1] * 10], 6)["signatures"]
    pieces = cases.make_index(PIG, layer, [130, 160, *[1] * 10], 6)["signatures"]
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_sampling_is_as_likely_as_the_formula_says():
    """Over seeds: P(codes agree in at least two of L tables), p = 1 − θ/π a sign."""
    rng = np.random.default_rng(0)
    bits, tables, draws = 3, 10, 400
    q, k = rng.standard_normal((2, 12, 8)).astype(np.float32)
    k[:4] = q[:4] + 0.3 * k[:4]  # from near to opposite
    k[4:6] = 0.3 * k[4:6] - q[4:6]
    angle = np.arccos(
        np.sum(q * k, -1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(k, axis=-1)
    )
    agree = (1 - angle / np.pi) ** bits
    want = 1 - (1 - agree) ** tables - tables * agree * (1 - agree) ** (tables - 1)
    # One hash of more tables is as good as many hashes.
    planes = directions(8, bits, tables * draws, 1)
    codes = (hash_codes(jnp.asarray(x), planes, bits) for x in (q, k))
    same = np.equal(*map(np.asarray, codes))
    sampled = same.reshape(12, draws, tables).sum(-1) >= 2
    spread = np.sqrt(want * (1 - want) / draws)
    assert np.all(np.abs(sampled.mean(1) - want) < 4.5 * spread + 1e-3)
    assert want.max() > 0.9 and want.min() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_corrected_by_the_formula(kind):
    layer, prompt = cases.draw_layer(kind, length=300), 280
    selector = MagicPIGTokens(bits=4, tables=30, seed=3, first=4, last=16)
    index = cases.make_index(selector, layer, [prompt, *[1] * 20], 6)
    keys = np.zeros((2, 2, 6 * 64, 8), np.float32)
    keys[:, :, :300] = np.swapaxes(layer.k, 1, 2)

    def corrections(number):
        tile = cases.tile_of(
            layer, index, slice(-1, None), 6, decoding=True, layer=number
        )
        return np.asarray(selector.token_correction(tile, jnp.asarray(keys), CONFIG))[
            ..., 0, :300
        ]

    assert not corrections(0).any() and not corrections(16).any()
    got = corrections(1)
    q = layer.grouped()[:, -1].astype(float)[:, :, :, None]  # B K G 1 H
    centre = layer.k[:, :prompt].astype(float).mean(1)[:, :, None]
    k = (np.swapaxes(layer.k, 1, 2) - centre)[:, :, None]
    length = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
    cosine = (q * k).sum(-1) / np.where(length > 0, length, 1)
    agree = (1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** 4
    chance = 1 - (1 - agree) ** 30 - 30 * agree * (1 - agree) ** 29
    exact = np.zeros(300, bool)
    exact[:4] = exact[prompt - 16 :] = True
    assert (got[..., exact] == 0).all()
    drawn = np.isfinite(got[..., ~exact])
    want = -np.log(chance[..., ~exact] + 1e-4)
    np.testing.assert_allclose(got[..., ~exact][drawn], want[drawn], atol=2e-2)
    same = _codes(q[..., 0, :])[..., None, :] == np.asarray(
        index["signatures"].codes[0, :, :, None, :300]
    )
    np.testing.assert_array_equal(drawn, (same.sum(-1) >= 2)[..., ~exact])
