"""Streams are consumed once: left and taken up again, by several loops and threads."""

import dataclasses
import threading

import pytest

import sparda_jax as sj
from sparda_jax.config import ConfigError

HOW = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "ignore_eos": True}
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def lm(text_lm):
    """A tiny random model, with the programs of the one that takes text."""
    return dataclasses.replace(text_lm, tokenizer=None)


@pytest.fixture(scope="module")
def want(lm):
    return sj.generate(lm, [PROMPT], **HOW).tokens[0]


def _take(events, count):
    return [next(events).token for _ in range(count)]


def test_a_stream_that_is_left_goes_on_where_it_stopped(lm, want):
    stream = sj.stream(lm, [PROMPT], **HOW)
    got = []
    for event in stream:
        got.append(event.token)
        if len(got) == 3:
            break
    assert stream.output is None
    got += [event.token for event in stream]
    assert got == want
    assert stream.output is not None and stream.output.tokens[0] == want
    # A second whole loop has nothing left, and does not change the output.
    before = stream.output
    assert list(stream) == []
    assert stream.output is before


def test_two_iterators_are_one(lm, want):
    stream = sj.stream(lm, [PROMPT], **HOW)
    first, second = iter(stream), iter(stream)
    got = [*_take(first, 2), *_take(second, 3), *_take(first, 1)]
    assert got + [event.token for event in second] == want
    assert list(first) == []


def test_threads_share_the_events_of_a_stream(lm, want):
    stream = sj.stream(lm, [PROMPT], tokens_per_call=1, **HOW)
    taken, order = [], threading.Lock()

    def pull():
        while True:
            with order:  # so that what is taken can be put in order
                event = next(stream, None)
                if event is None:
                    return
                taken.append(event.token)

    def pull_freely(into):
        into.extend(event.token for event in stream)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == want

    stream = sj.stream(lm, [PROMPT], tokens_per_call=1, **HOW)
    parts = [[], [], []]
    threads = [threading.Thread(target=pull_freely, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(want)
    assert stream.output is not None and stream.output.tokens[0] == want


def test_a_conversation_goes_on_once(lm):
    def begin():
        return sj.generate(lm, [PROMPT], **HOW).conversation

    def turn(conversation):
        return sj.stream(lm, [[4, 4]], conversation=conversation, **HOW)

    conversation = begin()
    first = turn(conversation)
    for other in (turn, lambda c: sj.generate(lm, [[4]], conversation=c, **HOW)):
        with pytest.raises(ConfigError, match="conversation is used up"):
            other(conversation)
    # The one that has it is not harmed by the others' tries.
    got = [event.token for event in first]
    assert got == sj.generate(lm, [[4, 4]], conversation=begin(), **HOW).tokens[0]


def test_a_refused_turn_leaves_the_conversation(lm):
    conversation = sj.generate(lm, [PROMPT], **HOW).conversation
    with pytest.raises(ConfigError, match="token id 500"):
        sj.stream(lm, [[500]], conversation=conversation)
    with pytest.raises(ConfigError, match="the conversation has 1"):
        sj.generate(lm, [[5], [6]], conversation=conversation)
    assert sj.generate(lm, [[4]], conversation=conversation, **HOW).tokens[0]


def test_a_stream_that_failed_says_so_again(lm):
    def fail(tokens):
        raise OSError("no room on the terminal")

    stream = sj.stream(lm, [PROMPT], on_progress=fail, **HOW)
    with pytest.raises(OSError, match="no room"):
        next(stream)
    with pytest.raises(RuntimeError, match="ended with an error"):
        list(stream)
    assert stream.output is None


def test_a_cancelled_stream_keeps_what_has_come(lm, want):
    stream = sj.stream(lm, [PROMPT], tokens_per_call=3, **HOW)
    assert stream.stats is None
    with pytest.raises(ConfigError, match=r"cancel\(\) is not allowed before"):
        stream.cancel()
    _take(stream, 2)
    assert stream.stats is not None and stream.stats.new_tokens == 4
    out = stream.cancel()
    assert out.tokens == [want[:4]]
    assert out.finish_reasons == ["cancelled"]
    assert stream.output is out is stream.cancel()
    assert list(stream) == []
    assert stream.stats is out.stats
    # It goes on as what asked for that many tokens does.
    short = sj.generate(lm, [PROMPT], **{**HOW, "max_new_tokens": 4})
    assert short.tokens == out.tokens and short.finish_reasons == ["length"]
    then = [
        sj.generate(lm, [[7, 8]], conversation=before.conversation, **HOW).tokens
        for before in (out, short)
    ]
    assert then[0] == then[1]


def test_an_ended_stream_is_not_cancelled(lm, want):
    stream = sj.stream(lm, [PROMPT], **HOW)
    assert [event.token for event in stream] == want
    assert stream.cancel() is stream.output
    assert stream.output.finish_reasons == ["length"]
