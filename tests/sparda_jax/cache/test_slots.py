"""The slot table."""

import jax.numpy as jnp
import numpy as np

from sparda_jax.cache.slots import empty_table, slot_of


def test_slot_of_an_absent_block():
    blocks = jnp.asarray([[[3, 1, -1]], [[0, 2, 4]]])
    got = slot_of(blocks, jnp.asarray([[1], [1]]))
    assert np.asarray(got).tolist() == [[1], [-1]]


def test_an_empty_table_holds_nothing():
    table = empty_table((2, 3, 4))
    assert table.blocks.shape == table.last_used.shape == (2, 3, 4)
    assert (slot_of(table.blocks, jnp.zeros((2, 3), jnp.int32)) == -1).all()
