"""Forks of a conversation: many questions on one prefill, each as if it were alone."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checks import ConfigError

HOW = {"max_new_tokens": 6, "ignore_eos": True}
QUESTIONS = [[5, 6, 7], [9] * 20, [100]]
OFFLOAD = sj.CacheConfig(kind="offload", device_blocks=None, prefetch="lookahead")
SLOW, LONG = pytest.mark.slow, pytest.mark.long


def _in_both_caches(*offloaded: pytest.MarkDecorator, resident: tuple = ()):
    """A test with the cache on the device and in host memory, and marks of each."""
    caches = [(sj.CacheConfig(), resident), (OFFLOAD, offloaded)]
    return pytest.mark.parametrize(
        "cache", [pytest.param(c, marks=marks, id=c.kind) for c, marks in caches]
    )


@pytest.fixture(scope="module")
def document(token_ids):
    # A question more, and the offloaded cache has still room: one program decodes both.
    return token_ids(690, seed=1)


def _read(lm, document):
    return sj.generate(lm, [document], **HOW).conversation


@pytest.fixture(scope="module")
def answers(lm, document):
    """What each question gets on a prefill of its own."""
    return [
        sj.generate(lm, [q], conversation=_read(lm, document), **HOW).tokens[0]
        for q in QUESTIONS
    ]


# What a fork copies of either cache: `test_every_row_of_a_fork_is_the_row`.
@_in_both_caches(SLOW, LONG)
def test_many_questions_on_one_prefill(lm, document, answers, cache):
    """Whatever is asked before, and in whatever order (public report kvpress#170)."""
    lm = dataclasses.replace(lm, cache=cache)
    read = _read(lm, document)
    before = jax.tree.map(np.array, read.state)
    for index in (2, 0, 1, 0):
        fork = read.fork()
        out = sj.generate(lm, [QUESTIONS[index]], conversation=fork, **HOW)
        assert out.tokens[0] == answers[index]
        assert fork.used_up and not read.used_up
    jax.tree.map(np.testing.assert_array_equal, read.state, before)
    # A fork does not need the original any more.
    fork, lengths = read.fork(), read.lengths
    out = sj.generate(lm, [QUESTIONS[1]], conversation=read, **HOW)
    assert out.tokens[0] == answers[1]
    assert fork.lengths == lengths
    out = sj.generate(lm, [QUESTIONS[2]], conversation=fork, **HOW)
    assert out.tokens[0] == answers[2]


@_in_both_caches(SLOW)
def test_every_row_of_a_fork_is_the_row(lm, document, cache):
    """In host memory too, and without a program of that many rows."""
    read = _read(dataclasses.replace(lm, cache=cache), document)
    fork = read.fork(rows=3)
    assert fork.lengths == read.lengths * 3
    kept, copied = read.state, fork.state
    if cache.kind == "offload":  # what is staged means nothing between two calls
        kept = kept._replace(cache=kept.cache._replace(staging=()))
        copied = copied._replace(cache=copied.cache._replace(staging=()))
    pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(copied), strict=True)
    for old, new in pairs:
        differ = [n for n, size in enumerate(old.shape) if new.shape[n] != size]
        for axis in differ:
            assert (old.shape[axis], new.shape[axis]) == (1, 3)
            old = np.repeat(old, 3, axis=axis)
        np.testing.assert_array_equal(new, old)


@_in_both_caches(SLOW, LONG, resident=(SLOW, LONG))
def test_questions_of_one_batch(lm, document, answers, cache):
    lm = dataclasses.replace(lm, cache=cache)
    read = _read(lm, document)
    fork = read.fork(rows=3)
    assert fork.lengths == read.lengths * 3
    out = sj.generate(lm, QUESTIONS, conversation=fork, **HOW)
    assert out.tokens == answers
    # Rows of a batch are forked together, and again after a turn.
    again = sj.generate(lm, QUESTIONS, conversation=out.conversation.fork(), **HOW)
    turn = sj.generate(lm, QUESTIONS, conversation=out.conversation, **HOW)
    assert again.tokens == turn.tokens


def test_forks_from_threads(lm, document, answers):
    """Any number fork while one goes on; those that come too late are told."""
    read = _read(lm, document)

    def ask(index):
        try:
            fork = read if index == 3 else read.fork()
            out = sj.generate(lm, [QUESTIONS[index % 3]], conversation=fork, **HOW)
        except ConfigError as error:
            return str(error)
        return out.tokens[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(ask, range(4)))
    assert got[3] == answers[0]
    for index in range(3):
        assert got[index] == answers[index] or "used up" in got[index]


def test_forks_that_cannot_be(lm, document):
    read = _read(lm, document)
    two = read.fork(rows=2)
    for conversation, rows, named in (
        (read, 0, "rows=0 is not allowed"),
        (two, 2, "this conversation has 2 rows"),
    ):
        with pytest.raises(ConfigError, match=named):
            conversation.fork(rows)
    limits = dataclasses.replace(read.made_with.cache, device_limit=10**6)
    small = dataclasses.replace(
        read, made_with=dataclasses.replace(read.made_with, cache=limits)
    )
    with pytest.raises(ConfigError, match=r"a fork of 40 rows needs .* device memory"):
        small.fork(40)
    sj.generate(lm, [[5]], conversation=read, **HOW)
    with pytest.raises(ConfigError, match="used up"):
        read.fork()
