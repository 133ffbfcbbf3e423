"""Quest-style selection against NumPy, and that its bound bounds."""

import numpy as np
import pytest
import selector_cases as cases
from selector_cases import KINDS, SPARSE

from sparda_jax.sparse.selectors import get_selector
from sparda_jax.sparse.selectors.quest import Quest


def _bounds(layer):
    """By the definition: [B, K, G, T, M], of whole blocks."""
    size, blocks = SPARSE.block_size, layer.length // SPARSE.block_size
    k = layer.k[:, : blocks * size].astype(float)
    k = k.reshape(k.shape[0], blocks, size, *k.shape[2:])
    least, most = k.min(2), k.max(2)  # B M K H
    q = layer.grouped()[:, :, None]  # B T 1 K G H
    pair = (x[:, None, :, :, None] for x in (least, most))
    products = [q * bound for bound in pair]
    return np.moveaxis(np.maximum(*products).sum(-1), (3, 4), (1, 2))


@pytest.mark.parametrize("over_group", ["sum", "max"])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_the_definition_s_and_the_bound_bounds(kind, over_group):
    layer = cases.draw_layer(kind)
    selector, blocks = Quest(over_group), 16
    index = cases.make_index(selector, layer, [layer.length], blocks)
    where = slice(400, None)
    bounds = _bounds(layer)[:, :, :, where]
    size, whole = SPARSE.block_size, bounds.shape[-1]
    k = layer.k[:, : whole * size].reshape(2, whole, size, *layer.k.shape[2:])
    products = np.einsum(
        "btkgh,bmskh->bkgtms", layer.grouped()[:, where], k, dtype=float
    )
    assert np.all(bounds >= products.max(-1) - 1e-4)
    want = bounds.sum(2) if over_group == "sum" else bounds.max(2)
    # A float32 sum may order near ties otherwise: none are this close here but the
    # exact ones.
    want = np.round(want, 3)
    tile = cases.tile_of(layer, index, where, blocks)
    got = cases.scored(selector, tile)
    np.testing.assert_allclose(got[..., :whole], want, rtol=1e-4, atol=2e-3)
    assert np.all(got[..., layer.blocks :] == -np.inf)
    lists = cases.listed(selector, tile)
    positions = np.arange(layer.length)[where]
    expected = cases.best_sets(got, positions, SPARSE)
    assert cases.listed_sets(lists) == expected


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([1] * 3 + [197], marks=[pytest.mark.slow, pytest.mark.long]),
        [60, 1, 1, 1, 1, 136],
        pytest.param([130, 70], marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize("page", [None, 16])
def test_bounds_kept_piece_by_piece_are_those_of_the_whole(pieces, page):
    layer = cases.draw_layer("adversarial", length=200)
    quest, held = Quest(page=page), -(-200 // (page or SPARSE.block_size))
    whole = cases.make_index(quest, layer, [200], 6)["key_bounds"]
    kept = cases.make_index(quest, layer, pieces, 6)["key_bounds"]
    np.testing.assert_array_equal(whole, kept)
    assert np.isinf(np.asarray(kept)[:, :, :, held:]).all()
    assert not np.isinf(np.asarray(kept)[:, :, :, :held]).any()


@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_a_block_has_the_bound_of_its_best_page(over_group):
    layer = cases.draw_layer("adversarial", length=256)
    tiles = [
        cases.tile_of(layer, cases.make_index(q, layer, [256], m), slice(200, None), m)
        for q, m in ((Quest(over_group, 16), 4), (Quest(over_group), 4))
    ]
    paged = cases.scored(Quest(over_group, 16), tiles[0])
    whole = cases.scored(Quest(over_group), tiles[1])
    q = layer.grouped()[:, 200:, :, :, None]  # B T K G 1 H
    pages = layer.k.reshape(2, 4, 4, 16, 2, 8)
    least, most = (
        np.moveaxis(x, 3, 1).reshape(2, 1, 2, 1, 16, 8)
        for x in (pages.min(3), pages.max(3))
    )
    each = np.maximum(q * least, q * most).sum(-1)  # B T K G pages
    each = each.sum(3) if over_group == "sum" else each.max(3)
    want = np.moveaxis(each.reshape(2, 56, 2, 4, 4).max(-1), 1, 2)
    np.testing.assert_allclose(paged, want, rtol=1e-4, atol=2e-3)
    assert np.all(paged <= whole + 2e-3 + 1e-4 * np.abs(whole))


def test_quest_16_is_quest_with_its_published_pages():
    found = get_selector("quest_16")
    assert (found.page, found.over_group) == (16, "sum")
    assert found.scores_per_block(SPARSE) == 2 * SPARSE.block_size // 16
