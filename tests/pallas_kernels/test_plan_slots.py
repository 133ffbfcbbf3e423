"""The plan of slots against its definition, and what holds for every plan."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import in_ci, slow_but

from pallas_kernels import plan_slots
from pallas_kernels.plan_slots.arg_specs import ARG_SPECS
from pallas_kernels.plan_slots.operands import Slots, checked
from pallas_kernels.plan_slots.pallas_triton import (
    MOST_SLOTS,
    Config,
    plan_slots_triton,
)
from pallas_kernels.plan_slots.reference import plan_slots_reference
from pallas_kernels.plan_slots.xla import by_number

CI_SPECS = in_ci(ARG_SPECS)
BLOCKS, LISTED = 24, 6
TABLES = ("blocks", "last_used", "page_table")
EMPTY_PAGES = np.full((1, 2, BLOCKS), -1, np.int32)
PLANS = {
    "triton": jax.jit(
        lambda *tables, **rest: plan_slots_triton(
            checked(*tables, **rest), interpret=True
        )
    ),
    "xla": jax.jit(functools.partial(plan_slots, implementation="xla")),
}


def _want(args):
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in args.items()}
    return plan_slots_reference(Slots(**arrays))


def _same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert a.dtype == jnp.int32
        np.testing.assert_array_equal(a, b, err_msg=name)


# The interpreter compiles long for each size; the others repeat the same code.
QUICK_TRITON = {"one_slot_more", "decode"}


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(
            spec,
            name,
            id=f"{spec.name}-{name}",
            marks=()
            if name == "xla" or spec.name in QUICK_TRITON
            else pytest.mark.slow,
        )
        for spec in CI_SPECS
        for name in PLANS
    ],
)
def test_plan(spec, name):
    args = spec.make()
    _same(PLANS[name](**args), _want(args))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda s: s.name)
def test_native(spec, implementation):
    call = jax.jit(functools.partial(plan_slots, implementation=implementation))
    for seed in range(4):
        args = spec.make(seed)
        _same(call(**args), _want(args))


@st.composite
def histories(draw):
    """Lists of a growing row, each in an order of its own: the row's tail block, others
    below it, padding."""
    tail_block = draw(st.integers(0, 4))
    lists = []
    for _ in range(draw(st.integers(1, 12))):
        tail_block = min(tail_block + draw(st.integers(0, 1)), BLOCKS - 1)
        blocks = draw(st.lists(st.integers(0, BLOCKS - 1), max_size=8))
        others = [b for b in blocks if b < tail_block][: LISTED - 1]
        listed = [tail_block, *dict.fromkeys(others)]
        listed += [-1] * (LISTED - len(listed))
        lists.append((tail_block, draw(st.permutations(listed))))
    return lists


@pytest.mark.parametrize("examples", slow_but({12}, (12, 60)))
def test_a_history_of_lists(examples):
    sizes = (LISTED + 1,) if examples < 60 else (LISTED, LISTED + 1, 2 * LISTED)

    @settings(max_examples=examples, deadline=None)
    @given(history=histories(), slots=st.sampled_from(sizes))
    def check(history, slots):
        _check_history(history, slots)

    check()


def _check_history(history, slots):
    # NumPy arrays: nothing but the plans themselves is a program.
    empty = np.full((1, 2, slots), -1, np.int32)
    args = {"blocks": empty, "last_used": empty, "page_table": EMPTY_PAGES}
    tail = None
    for step, (tail_block, listed) in enumerate(history):
        values = {"step": step, "tail_block": tail_block}
        args |= {k: np.full((1, 2), v, np.int32) for k, v in values.items()}
        args |= {"source": 0, "target": 0}
        args["listed"] = np.asarray([[listed, listed]], np.int32)
        want = _want(args)
        for call in PLANS.values():
            _same(call(**args), want)

        held = set(np.asarray(args["blocks"])[0, 0].tolist()) - {-1}
        asked = {b for b in listed if b >= 0}
        filled = [b for b in want.blocks[0, 0].tolist() if b >= 0]
        assert len(filled) == len(set(filled)), "a block in two slots"
        assert asked <= set(filled), "a selected block without a slot"
        fetched = set(want.sources.reshape(-1, 2)[:, 0].tolist()) - {-1}
        assert fetched == asked - held - {tail_block}, (
            "misses are selected minus resident"
        )
        slot = want.blocks[0, 0].tolist().index(tail_block)
        assert tail is None or tail[0] != tail_block or tail[1] == slot, (
            "the tail moved"
        )
        tail = tail_block, slot
        args |= {name: getattr(want, name) for name in TABLES}


@settings(max_examples=60, deadline=None)
@given(
    history=histories(), slots=st.sampled_from([LISTED, 2 * LISTED, BLOCKS - 1, BLOCKS])
)
def test_a_row_is_a_least_recently_used_cache(history, slots):
    """Against a dictionary, up to a slot for every block: nobody who stays was asked
    for before one who goes, nobody goes while a slot is empty, the table knows all."""
    tables = dict.fromkeys(TABLES[:2], np.full((1, slots), -1, np.int32))
    tables["page_table"] = EMPTY_PAGES[0, :1]
    stamps = {}
    for step, (tail_block, listed) in enumerate(history):
        plan = PLANS["xla"](
            **tables,
            listed=np.asarray([listed], np.int32),
            step=np.full(1, step, np.int32),
            tail_block=np.full(1, tail_block, np.int32),
            source=0,
            target=0,
        )
        asked = {block for block in listed if block >= 0}
        new = asked - stamps.keys()
        filled = {
            slot: block
            for slot, block in enumerate(np.asarray(plan.blocks)[0].tolist())
            if block >= 0
        }
        gone = stamps.keys() - set(filled.values())
        assert set(filled.values()) == (stamps.keys() | asked) - gone
        assert len(gone) == max(0, len(stamps) + len(new) - slots)
        stay = [stamps[block] for block in stamps.keys() - gone - asked]
        assert not gone or max(stamps[b] for b in gone) <= min(stay, default=step)
        assert int(plan.hits) == len(asked) - len(new)
        assert int(plan.fetched) == len(new - {tail_block})
        pages = dict(enumerate(np.asarray(plan.page_table)[0].tolist()))
        held = {slot: block for block, slot in pages.items() if slot >= 0}
        assert held == filled
        found = [filled.get(slot) for slot in np.asarray(plan.slots)[0].tolist()]
        assert found == [block if block >= 0 else None for block in listed]
        stamps = {b: s for b, s in stamps.items() if b not in gone}
        stamps |= dict.fromkeys(asked, step)
        tables = {name: getattr(plan, name) for name in TABLES}


@pytest.mark.parametrize("name", PLANS)
def test_tail_is_never_evicted(name):
    """The row's tail block stays where it is, however the rest changes."""
    rng = np.random.default_rng(0)
    blocks = last_used = jnp.full((1, 1, LISTED), -1, jnp.int32)
    page_table = jnp.full((1, 1, 16), -1, jnp.int32)
    slots = []
    for step in range(40):
        others = rng.permutation(15)[: LISTED - 1]
        listed = rng.permutation([15, *others])
        plan = PLANS[name](
            blocks,
            last_used,
            page_table,
            jnp.asarray(listed[None, None], jnp.int32),
            step=jnp.full((1, 1), step, jnp.int32),
            tail_block=jnp.full((1, 1), 15, jnp.int32),
            source=0,
            target=0,
        )
        blocks, last_used, page_table = (getattr(plan, name) for name in TABLES)
        slots.append(np.asarray(blocks)[0, 0].tolist().index(15))
    assert len(set(slots)) == 1


@pytest.mark.parametrize("name", PLANS)
def test_rows_without_a_list_keep_their_slots(name):
    table = {"blocks": [[3, 1, -1]], "last_used": [[5, 6, -1]]}
    table |= {"page_table": [[-1, 1, -1, 0, -1]], "listed": [[-1, -1]]}
    table = {k: jnp.asarray(v, jnp.int32) for k, v in table.items()}
    values = {"source": 1, "target": 1}
    nine = jnp.asarray([9], jnp.int32)
    plan = PLANS[name](**table, **values, step=nine, tail_block=nine)
    for name in TABLES:
        np.testing.assert_array_equal(getattr(plan, name), table[name])
    for x in (plan.slots, plan.sources, plan.targets):
        assert (x == -1).all()
    assert not any((plan.bound, plan.fetched, plan.hits))


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


def test_refusals():
    args = CI_SPECS[0].make()
    with pytest.raises(NotImplementedError, match="no plan_slots"):
        plan_slots(**args, implementation="mosaic_gpu")
    many = jnp.full((1, MOST_SLOTS + 1), -1)
    wide = CI_SPECS[5].make() | {"blocks": many, "last_used": many}
    with pytest.raises(NotImplementedError, match=f"at most {MOST_SLOTS} slots"):
        plan_slots_triton(checked(**wide), interpret=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": jnp.zeros((3,), jnp.int32)}, "blocks has shape"),
        ({"blocks": jnp.zeros((2, 2, 24))}, "blocks has dtype"),
        ({"last_used": jnp.zeros((2, 2, 25), jnp.int32)}, "last_used has shape"),
        ({"listed": jnp.zeros((2, 3, 24), jnp.int32)}, "listed has shape"),
        ({"listed": jnp.zeros((2, 2, 25), jnp.int32)}, "listed has 25 blocks a row"),
        ({"tail_block": jnp.zeros((2, 2))}, "tail_block has dtype"),
        ({"target": jnp.zeros((2,), jnp.int32)}, "target has shape"),
        ({"source": 0.5}, "source has dtype"),
        ({"page_table": jnp.zeros((2, 3, 60), jnp.int32)}, "page_table has shape"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = CI_SPECS[0].make() | change
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_slots(**args)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_warps is 3"):
        Config(3)
