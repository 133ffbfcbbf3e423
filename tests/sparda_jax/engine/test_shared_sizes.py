"""Small requests share programs, and what is rounded up changes no token."""

import dataclasses
import functools

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.engine import call
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.inference.shapes import shared_rows, shared_shapes

HOT = {"temperature": 1.5, "ignore_eos": True}
TURN = [[4], [5], [6]]


@pytest.fixture(scope="module")
def prompts(token_ids):
    # A turn more, and the closest cache has still room: one program decodes both.
    return [token_ids(length, seed=length) for length in (180, 3, 150)]


def _close_sizes(monkeypatch):
    """Sizes as a large request has them: none of its own is rounded up for others."""
    place = call.place

    def exact(lm, sizes, conversation, **how):
        odd = dataclasses.replace(lm.sparse, mask_future_blocks=False)
        found = place(dataclasses.replace(lm, sparse=odd), sizes, conversation, **how)
        return dataclasses.replace(
            found, settings=dataclasses.replace(found.settings, sparse=lm.sparse)
        )

    monkeypatch.setattr(call, "place", exact)


def _padded_and_close(lm, prompts, monkeypatch):
    """What a request gives as it runs, and in close sizes."""
    how = {"max_new_tokens": 9, "seed": [1, 2, 3], **HOT}
    padded = sj.generate(lm, prompts, **how)
    with monkeypatch.context() as patch:
        _close_sizes(patch)
        close = sj.generate(lm, prompts, **how)
    return padded, close


@pytest.mark.slow
def test_rows_of_padding_change_no_token(lm, prompts, monkeypatch):
    """Three rows run as four, in larger arrays: tokens are those of the close sizes."""
    padded, close = _padded_and_close(lm, prompts, monkeypatch)
    assert padded.conversation.state.lengths.shape == (4,)
    assert padded.conversation.lengths == (188, 11, 158)
    assert padded.stats.batch == 3 and padded.stats.new_tokens == 27
    state = close.conversation.state
    assert state.lengths.shape == (3,) and state.tokens.shape == (3, 128)
    assert padded.tokens == close.tokens
    assert padded.stats.decode_blocks == close.stats.decode_blocks
    assert padded.stats.prefill_blocks == close.stats.prefill_blocks


@pytest.mark.slow
@pytest.mark.long  # of a first turn: above
def test_rows_of_padding_change_no_token_of_a_turn(lm, prompts, monkeypatch):
    padded, close = _padded_and_close(lm, prompts, monkeypatch)
    how = {"max_new_tokens": 4, **HOT}
    with monkeypatch.context() as patch:
        _close_sizes(patch)
        again = sj.generate(lm, TURN, conversation=close.conversation, **how)
    turn = sj.generate(lm, TURN, conversation=padded.conversation, **how)
    assert turn.tokens == again.tokens
    assert len(turn.tokens) == 3


def test_sizes_of_small_requests_are_few():
    """All of them: rows, prompts and new tokens that docs/python.md promises."""
    sizes = functools.partial(
        shared_shapes, farthest_start=0, tile_size=256, block_size=64
    )
    prefills, decodes = set(), set()
    for rows in {shared_rows(batch) for batch in range(1, 9)}:
        for prompt in range(1, 4001):
            for new in (1, 100, 256):
                found = sizes(rows, prompt, longest=prompt, max_new=new)
                assert found is not None
                assert found.capacity >= max(prompt + new, found.prompt)
                prefills.add((rows, found))
                decodes.add((rows, found.capacity, found.new))
    assert (len(prefills), len(decodes)) == (5, 5)
    assert shared_rows(9) is None
    assert sizes(1, 5000, longest=5000, max_new=1) is None
    assert sizes(1, 5, longest=5, max_new=600) is None


@pytest.mark.slow
def test_what_does_not_fit_rounded_up_takes_close_sizes(lm, prompts):
    """A limit between the two: the request runs as it did without sharing."""
    shared = sj.generate(lm, prompts, max_new_tokens=2)
    assert shared.conversation.state.cache.capacity == 4608
    limited = dataclasses.replace(lm, cache=sj.CacheConfig(device_limit=12 * 2**20))
    close = sj.generate(limited, prompts, max_new_tokens=2)
    assert close.conversation.state.cache.capacity == 256
    assert close.tokens == shared.tokens


def test_the_second_hundred_requests_needs_no_new_size():
    """Mixed ones, as many as two hundred: the first hundred has all ten programs."""
    random, programs, counts = np.random.default_rng(7), set(), []
    for _ in range(2):
        for _ in range(100):
            batch, new = int(random.integers(1, 9)), int(random.integers(1, 257))
            longest = int(max(random.integers(1, 4001, batch)))
            rows = shared_rows(batch)
            found = shared_shapes(
                rows,
                longest,
                farthest_start=0,
                longest=longest,
                max_new=new,
                tile_size=256,
                block_size=64,
            )
            programs |= {("prefill", rows, found), ("decode", rows, found.capacity)}
        counts.append(len(programs))
    assert counts == [10, 10]


@pytest.mark.slow
@pytest.mark.long  # the sizes of all ten: `test_sizes_of_small_requests_are_few`
def test_ten_programs_serve_all_small_requests(lm, token_ids):
    """A call of every size compiles them, and no other call any more."""
    PROGRAMS.clear()
    before, compiled = PROGRAMS.compiled, []
    first = ((1, 5, 3), (1, 1100, 2), (2, 30, 2), (3, 40, 2), (7, 20, 2))
    later = ((8, 200, 5), (5, 1, 1), (4, 900, 3), (2, 1500, 2), (1, 1000, 9))
    for calls in (first, later):
        for rows, longest, new in calls:
            lengths = [longest, *range(1, rows)]
            prompts = [token_ids(length) for length in lengths]
            sj.generate(lm, prompts, max_new_tokens=new)
        compiled.append(PROGRAMS.compiled - before)
    assert compiled == [10, 10]
