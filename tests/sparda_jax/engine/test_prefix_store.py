"""Beginnings of prompts that rows share: nothing of an answer changes."""

import dataclasses

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checks import ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.prefix_store import PrefixStore
from sparda_jax.engine.session import Session

OFFLOAD = sj.CacheConfig(kind="offload", route="dynamic_slice", device_blocks=8)


def test_a_tree_of_pieces():
    store = PrefixStore(piece=2, most_bytes=100)
    blocks, index = np.zeros(40, np.int8), np.zeros(8, np.int8)
    first = store.add(store.root, [1, 2], blocks, index)
    assert first is not None and store.nbytes == 48
    second = store.add(first, [3, 4], blocks, index)
    assert second is not None
    assert store.follow(store.root, [1, 2, 3, 4, 5], 9) == [first, second]
    # A token is left over, and no more pieces than asked for.
    assert store.follow(store.root, [1, 2, 3, 4], 9) == [first]
    assert store.follow(store.root, [1, 2, 3, 4, 5], 1) == [first]
    assert store.follow(store.root, [2, 1, 3], 9) == []
    assert store.add(store.root, [1, 2], blocks, index) is first
    # The end that was used longest ago goes; a beginning stays while something follows.
    other = store.add(store.root, [7, 7], blocks, index)
    assert other is not None and len(store) == 2 and not store.holds(second)
    third = store.add(other, [8, 8], blocks, index)
    assert third is not None and not store.holds(first) and store.holds(other)
    assert store.add(third, [9, 9], np.zeros(90, np.int8), index) is None
    store.clear()
    assert len(store) == store.nbytes == 0 and not store.holds(other)


def test_a_full_store_writes_where_the_dropped_piece_was():
    """So that the process does not grow by the holes between pieces."""
    store = PrefixStore(piece=2, most_bytes=100)

    def add(behind, number: int, size: int = 40):
        blocks, index = np.full(size, number, np.int8), (np.full(8, -number, np.int8),)
        made = store.add(behind, [number, number], blocks, index)
        assert made is not None and not np.shares_memory(made.blocks, blocks)
        assert (made.blocks == number).all() and (made.index[0] == -number).all()
        return made

    first = add(store.root, 1)
    second = add(first, 2)
    places = [first.blocks, second.blocks, first.index[0], second.index[0]]
    for number in range(3, 9):
        new = add(store.root, number)
        assert any(new.blocks is place for place in places)
        assert any(new.index[0] is place for place in places)
        assert len(store) == 2
    # What has another shape takes memory of its own.
    assert add(store.root, 9, size=41).blocks.size == 41


def test_what_finds_no_room_drops_nothing():
    store, index = PrefixStore(2, 100), np.zeros(0, np.int8)

    def add(behind, number: int, size: int):
        return store.add(behind, [number, number], np.zeros(size, np.int8), index)

    first = add(store.root, 1, 40)
    second = add(first, 2, 30)
    other = add(store.root, 3, 20)
    assert first is not None and second is not None and other is not None
    # Larger than the store, or than what is left beside the pieces before it.
    assert add(store.root, 4, 101) is None and add(second, 4, 31) is None
    assert all(map(store.holds, (first, second, other))) and store.nbytes == 90
    # All but those before it makes just enough room.
    third = add(second, 4, 30)
    assert third is not None and not store.holds(other) and store.nbytes == 100


SIZES = {"rows": 2, "max_context": 640, "max_new_tokens": 64, "prefill_chunk": 128}
OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "ignore_eos": True}


def _answers(session: Session, prompts, options, first=0) -> tuple[list, list[int]]:
    """Tokens with their logs, and cached tokens, of prompts one after the other."""
    answers, cached = [], []
    for number, prompt in enumerate(prompts, first):
        row = session.join(prompt, logprobs=True, seed=number, **options)
        while not session.prefill(row):
            pass
        while row in session.running:
            session.decode(3)
        events = [e for e in session.take_events() if e.token >= 0]
        answers.append([(e.token, e.logs.logprob) for e in events if e.logs])
        assert len(answers[-1]) == len(events)
        cached.append(session.cached_tokens(row))
        session.leave(row)
    return answers, cached


def _check(lm, token_ids, cache, prompts, expected_cached):
    placed = dataclasses.replace(lm, cache=cache)
    plain = Session.open(placed, top_logprobs=1, **SIZES)
    plain.warm_up()
    expected, none = _answers(plain, prompts, OPTIONS)
    assert set(none) == {0}
    session = Session.open(placed, top_logprobs=1, prefix_bytes=2**28, **SIZES)
    session.compile_programs()
    before = PROGRAMS.compiled
    session.warm_up()
    found, cached = _answers(session, prompts, OPTIONS)
    assert found == expected  # log-probabilities bit for bit
    assert cached == expected_cached
    assert PROGRAMS.compiled == before


def _prompts(token_ids) -> tuple[list[list[int]], list[int]]:
    """Prompts that begin alike, and how much of each has been run before."""
    long = token_ids(400)
    return [
        long,
        long,
        [*long[:300], *token_ids(90, seed=1)],
        [*long[:384], 5],
        token_ids(130, seed=2),
        long[:128],
    ], [0, 384, 256, 384, 0, 0]


@pytest.mark.slow
def test_hits_change_no_answer(lm, token_ids):
    """With the index of a forecast and blocks of 8 bits in host memory."""
    int8 = dataclasses.replace(OFFLOAD, codec="int8")
    _check(lm, token_ids, int8, *_prompts(token_ids))


# Some of what it keeps of the keys ends with the prompt; what `sparda` keeps goes on.
KINDS = ("snapkv",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.long)
        for name in sj.selector_names()
    ],
)
def test_hits_change_no_answer_of_any_selector(lm, token_ids, attention):
    if attention == "nosa":  # it needs a model of its own
        placed = sj.load("tiny-nosa", attention="nosa", storage="stacked")
    else:
        placed = sj.with_attention(lm, attention)
    prompts, cached = _prompts(token_ids)
    # What lists no blocks has a slot for each.
    cache = dataclasses.replace(OFFLOAD, device_blocks=None)
    placed = dataclasses.replace(placed, cache=cache)

    def answers(prompts, first=0):
        session = Session.open(placed, top_logprobs=1, prefix_bytes=2**28, **SIZES)
        return _answers(session, prompts, OPTIONS, first)

    found, hits = answers(prompts)
    assert hits == cached
    # The first prompt of a session finds nothing there.
    for number, prompt in enumerate(prompts):
        assert answers([prompt], number) == ([found[number]], [0])


@pytest.mark.slow
@pytest.mark.long  # what is dropped: above; beginnings shared: `test_scheduler`
def test_a_store_that_is_full_changes_no_answer(lm, token_ids):
    """Two rows read at once; every piece is written where one was that either took."""
    placed = dataclasses.replace(lm, cache=OFFLOAD)
    whole = Session.open(placed, prefix_bytes=2**28, top_logprobs=1, **SIZES)
    whole.warm_up()
    begin = [token_ids(260, seed=seed) for seed in range(3)]
    random = np.random.default_rng(0)
    prompts = [
        [*begin[number % 3][: int(random.integers(130, 260))], *token_ids(150, seed=9)]
        for number in range(12)
    ]

    def answers(session: Session) -> tuple[list, int]:
        found, reused = [], 0
        for pair in zip(prompts[::2], prompts[1::2], strict=True):
            options = {"max_new_tokens": 5, "ignore_eos": True, "logprobs": True}
            rows = [session.join(prompt, **options) for prompt in pair]
            left = list(rows)
            while left:
                row = left.pop(0)
                left += [] if session.prefill(row) else [row]
            session.decode(5)
            found += [(e.index, e.token, e.logs) for e in session.take_events()]
            reused += sum(session.cached_tokens(row) for row in rows)
            for row in rows:
                session.leave(row)
        return found, reused

    expected, _ = answers(whole)
    assert whole._store is not None
    piece = whole._store.nbytes // len(whole._store)
    small = Session.open(placed, prefix_bytes=2 * piece, top_logprobs=1, **SIZES)
    small.warm_up()
    found, reused = answers(small)
    assert found == expected and reused > 0
    assert small._store is not None and len(small._store) == 2


@pytest.mark.slow
@pytest.mark.long  # beginnings are shared in `test_scheduler` too
def test_rows_that_read_at_once_share_their_pieces(lm, token_ids):
    """Each piece is run by one of them; a store that holds none is refused."""
    placed = dataclasses.replace(lm, cache=OFFLOAD)
    session = Session.open(placed, prefix_bytes=2**28, top_logprobs=1, **SIZES)
    rows = [session.join(token_ids(400), max_new_tokens=2) for _ in range(2)]
    left = set(rows)
    while left:
        left -= {row for row in sorted(left) if session.prefill(row)}
    assert sum(session.cached_tokens(row) for row in rows) == 384
    small = Session.open(placed, prefix_bytes=1, top_logprobs=1, **SIZES)
    with pytest.raises(ConfigError, match="prefix_bytes=1"):
        small.warm_up()


def test_pieces_are_whole_blocks(lm):
    placed = dataclasses.replace(lm, cache=OFFLOAD)
    with pytest.raises(ConfigError, match="prefill_chunk=100"):
        Session.open(placed, prefix_bytes=1, **{**SIZES, "prefill_chunk": 100})
