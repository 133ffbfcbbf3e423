"""The `window` selector: init and local blocks, and nothing else."""

import numpy as np
import pytest
import selector_cases as cases
from selector_cases import CONFIG, SPARSE, check_everywhere

from sparda_jax.sparse.selectors.window import Window


def test_lists_are_the_first_and_the_latest_blocks():
    layer = cases.draw_layer("random")
    tile = cases.tile_of(layer, {}, slice(None), 16)
    lists = cases.listed_sets(Window().select(tile, CONFIG, SPARSE))
    own = np.arange(layer.length) // SPARSE.block_size
    want = [{0, block, max(0, block - 1), max(0, block - 2)} for block in own.tolist()]
    assert lists == want * 4  # two rows, two kv heads


@pytest.mark.slow
@pytest.mark.long  # resident, and as dense: `test_every_selector`
def test_window_runs_everywhere():
    check_everywhere("window")
