"""What holds for the slot table before any plan, and where there is nothing to plan."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import plan_slots
from sparda_jax.cache.slots import (
    SlotTable,
    empty_table,
    filled_table,
    plan_own_slots,
    slot_of,
)


def test_slot_of_an_absent_block():
    blocks = jnp.asarray([[[5, 2], [1, -1]]])
    table = filled_table(blocks, jnp.zeros_like(blocks), 6)
    assert slot_of(table, jnp.asarray([[2]])).tolist() == [[1, -1]]
    assert slot_of(table, jnp.asarray([[1, 1]])).tolist() == [[-1, 0]]
    for outside in (-1, 6):
        assert slot_of(table, jnp.asarray([[outside]])).tolist() == [[-1, -1]]


def test_an_empty_table_holds_nothing():
    table = empty_table((2, 3), 4, 9)
    assert table.blocks.shape == table.last_used.shape == (2, 3, 4)
    assert table.page_table.shape == (2, 3, 9) and not table.own_slots
    assert (slot_of(table, jnp.zeros((2, 3), jnp.int32)) == -1).all()


def test_own_slots_are_what_a_plan_gives():
    """Lists of a growing row, with padding: nothing moves, whoever plans."""
    table = empty_table((1, 2), 12, 12)
    assert table.own_slots
    held = jnp.where(jnp.arange(12) < 5, jnp.arange(12), -1)
    table = filled_table(
        jnp.broadcast_to(held, (1, 2, 12)), jnp.where(table.blocks == held, -1, 3), 12
    )
    random = np.random.default_rng(0)
    for step in range(20):
        tail = 4 + step // 3
        listed = [
            [tail, *random.choice(tail, 3, replace=False).tolist(), -1]
            for _ in range(2)
        ]
        listed = jnp.asarray([random.permuted(listed, axis=1)], jnp.int32)
        steps, tails = (jnp.full((1, 2), x, jnp.int32) for x in (step + 9, tail))
        want = plan_slots(
            *table, listed, step=steps, tail_block=tails, source=0, target=0
        )
        got = plan_own_slots(table, listed, steps)
        for name, a, b in zip(want._fields, got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert int(want.fetched) == 0
        table = SlotTable(got.blocks, got.last_used, got.page_table)
