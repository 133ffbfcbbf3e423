"""The `random` selector: seeded, and the same however a prompt is cut."""

import jax.numpy as jnp
import numpy as np
import pytest
from selector_cases import SPARSE, check_everywhere

from sparda_jax.models.presets import get_preset
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors.random import Random


@pytest.mark.slow
def test_random_runs_everywhere():
    check_everywhere("random")


def test_a_seed_draws_the_same_blocks():
    tile = SelectionTile(
        q=None,
        forecast=None,
        positions=jnp.arange(2000, 2004)[None],
        length=jnp.full((1,), 2004),
        index={},
        num_blocks=40,
        decoding=False,
    )
    config = get_preset("tiny").model
    lists = [Random(seed).select(tile, config, SPARSE) for seed in (0, 0, 1)]
    first, again, other = (set(np.asarray(blocks).ravel().tolist()) for blocks in lists)
    assert first == again != other
