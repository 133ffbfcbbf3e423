"""The slot table against a plain Python model of it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.cache.slots import (
    SlotTable,
    by_number,
    empty_table,
    plan_slots,
    slot_of,
)

BLOCKS = 24
LISTED = 6
_plan = jax.jit(plan_slots)


class Model:
    """One row's slots: a dictionary from slot to block, and when each was asked for."""

    def __init__(self, slots: int):
        self.blocks: list[int | None] = [None] * slots
        self.used = [-1] * slots

    def ask(self, listed: list[int], stamp: int) -> tuple[list[int], list[bool]]:
        """Places the blocks; returns each one's slot and whether it was missing."""
        asked = [b for b in listed if b >= 0]
        victims = sorted(
            (s for s, b in enumerate(self.blocks) if b not in asked),
            key=lambda s: (self.blocks[s] is not None, self.used[s], s),
        )
        slots, missing = [], []
        for block in listed:
            if block < 0:
                slots.append(-1)
                missing.append(False)
                continue
            new = block not in self.blocks
            slot = victims.pop(0) if new else self.blocks.index(block)
            self.blocks[slot], self.used[slot] = block, stamp
            slots.append(slot)
            missing.append(new)
        return slots, missing


def _lists(draw_blocks, own):
    """A list as selections are: the row's own block, others below it, padding."""
    others = [b for b in draw_blocks if b < own][: LISTED - 1]
    listed = [own, *dict.fromkeys(others)]
    return listed + [-1] * (LISTED - len(listed))


@st.composite
def histories(draw):
    """Lists of a growing row, each in an order of its own."""
    own = draw(st.integers(0, 4))
    lists = []
    for _ in range(draw(st.integers(1, 12))):
        own = min(own + draw(st.integers(0, 1)), BLOCKS - 1)
        blocks = draw(st.lists(st.integers(0, BLOCKS - 1), max_size=8))
        lists.append(draw(st.permutations(_lists(blocks, own))))
    return lists


@settings(max_examples=60, deadline=None)
@given(history=histories(), slots=st.sampled_from([LISTED, LISTED + 1, 2 * LISTED]))
def test_slots_follow_the_model(history, slots):
    model, table = Model(slots), empty_table((1, 2, slots))
    for stamp, listed in enumerate(history):
        held = set(np.asarray(table.blocks)[0, 0].tolist()) - {-1}
        lists = jnp.asarray([[listed, listed]], jnp.int32)
        plan = _plan(table, lists, jnp.full((1, 2), stamp, jnp.int32))
        want_slots, want_missing = model.ask(list(listed), stamp)
        # Both heads of the row are planned alike.
        for head in range(2):
            assert np.asarray(plan.slots)[0, head].tolist() == want_slots
            assert np.asarray(plan.missing)[0, head].tolist() == want_missing
        table = plan.table
        blocks = np.asarray(table.blocks)[0, 0]
        assert [None if b < 0 else b for b in blocks] == model.blocks
        assert np.asarray(table.used)[0, 0].tolist() == model.used

        asked = {b for b in listed if b >= 0}
        filled = blocks[blocks >= 0].tolist()
        assert len(filled) == len(set(filled)), "a block in two slots"
        assert asked <= set(filled), "a selected block without a slot"
        missed = {b for b, new in zip(listed, want_missing, strict=True) if new}
        assert missed == asked - held, "misses are selected minus resident"


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.lists(
        st.lists(st.booleans(), min_size=LISTED, max_size=LISTED),
        min_size=3,
        max_size=3,
    ),
    numbered=st.lists(st.booleans(), min_size=3 * LISTED, max_size=3 * LISTED),
)
def test_lists_go_round_the_rows(wanted, numbered):
    # Numbers may also count entries that are not marked, as a new tail block's.
    marked = np.asarray(wanted)
    counted = marked | np.asarray(numbered).reshape(marked.shape)
    number = np.cumsum(counted, axis=1) - 1
    value = np.arange(marked.size).reshape(marked.shape)
    got, doubled = by_number(*map(jnp.asarray, (marked, number, value, 2 * value)))
    want = np.full((LISTED, 3), -1)
    for row, entry in zip(*np.nonzero(marked), strict=True):
        want[number[row, entry], row] = value[row, entry]
    np.testing.assert_array_equal(got, want.reshape(-1))
    np.testing.assert_array_equal(doubled, np.where(want < 0, -1, 2 * want).reshape(-1))


def test_tail_is_never_evicted():
    """The row's own block stays where it is, however the rest changes."""
    rng = np.random.default_rng(0)
    table, slots = empty_table((1, 1, LISTED)), []
    for stamp in range(40):
        others = rng.permutation(15)[: LISTED - 1]
        listed = rng.permutation([15, *others])
        plan = _plan(
            table, jnp.asarray(listed[None, None], jnp.int32), jnp.full((1, 1), stamp)
        )
        table = plan.table
        slots.append(int(slot_of(table.blocks, jnp.full((1, 1), 15))[0, 0]))
    assert len(set(slots)) == 1


def test_rows_without_a_list_keep_their_slots():
    table = SlotTable(jnp.asarray([[[3, 1, -1]]]), jnp.asarray([[[5, 6, -1]]]))
    plan = _plan(table, jnp.full((1, 1, 2), -1, jnp.int32), jnp.full((1, 1), 9))
    np.testing.assert_array_equal(plan.table.blocks, table.blocks)
    np.testing.assert_array_equal(plan.table.used, table.used)
    assert not plan.missing.any()
    assert (plan.slots == -1).all()


def test_slot_of_an_absent_block():
    blocks = jnp.asarray([[[3, 1, -1]], [[0, 2, 4]]])
    got = slot_of(blocks, jnp.asarray([[1], [1]]))
    assert np.asarray(got).tolist() == [[1], [-1]]
