"""No selector ever drops a forced block, whatever the scores and however small the
budget."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.config import SparseConfig
from sparda_jax.models.presets import get_preset
from sparda_jax.sparse.compression import CompressedKeys
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors import get_selector, selector_names

BLOCKS, BLOCK, WINDOWS = 12, 64, 4
NOSA = get_preset("tiny-nosa").model
# Few values: ties are common.
SCORES = st.sampled_from([0.0, 1.0, -1.0, 3e38, np.inf, -np.inf, np.nan])


@st.composite
def _rows(draw):
    """A geometry, a position, and scores of windows and of importance.

    Plain values: a type check of what is made of them may draw random numbers.
    """
    init, local = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    geometry = {
        "init_blocks": init,
        "local_blocks": local,
        "block_budget": init + local + 1 + draw(st.integers(0, 3)),
        "query_blocks": draw(st.integers(0, 30)),
        "mask_future_blocks": draw(st.booleans()),
    }
    windows = BLOCKS * WINDOWS
    drawn = st.lists(SCORES, min_size=windows, max_size=windows)
    position = draw(st.integers(0, BLOCKS * BLOCK - 1))
    return geometry, position, draw(drawn), draw(drawn)


# They are `quest` but for their scores, which are drawn here.
_AS_QUEST = ("quest_16", "infllm_v2_bounds")
LISTING = [
    name
    for name in selector_names()
    if not get_selector(name).dense and name not in _AS_QUEST
]


@pytest.mark.parametrize("name", LISTING)
@pytest.mark.parametrize(
    "examples",
    [6, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.long])],
)
def test_forced_blocks_are_always_listed(name, examples):
    @settings(max_examples=examples, deadline=None)
    @given(_rows())
    def check(row):
        _check_forced_blocks(name, row)

    check()


def _check_forced_blocks(name, row):
    geometry, position, *drawn = row
    sparse = SparseConfig(**geometry)
    scores, importance = (
        jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in drawn
    )
    importance = importance[:, 0]
    blocks = scores.reshape(1, 1, 1, BLOCKS, -1).max(-1)
    selector, model = get_selector(name), dataclasses.replace(NOSA, num_kv_heads=1)

    class Scored(type(selector)):
        """The selector with other scores."""

        def score(self, tile, config, sparse, implementation):
            return blocks

    tile = SelectionTile(
        q=None,
        forecast=None,
        positions=jnp.full((1, 1), position),
        length=jnp.full((1,), position + 1),
        index={"importance": CompressedKeys(importance[..., None], jnp.zeros(()))},
        num_blocks=BLOCKS,
        decoding=True,
    )
    lists = Scored().select(tile, model, sparse)
    assert lists is not None and lists.shape[-1] == selector.budget(sparse)
    listed = [block for block in np.asarray(lists).ravel().tolist() if block >= 0]
    own = position // BLOCK
    assert len(set(listed)) == len(listed)
    assert all(block <= own for block in listed)
    local = range(max(0, own - sparse.local_blocks), own + 1)
    assert {*range(min(sparse.init_blocks, own + 1)), *local} <= {*listed}
