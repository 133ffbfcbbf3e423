"""Rows that join and leave a running batch: each as if it were alone."""

import dataclasses

import jax
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checks import ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.session import Session

OFFLOAD = sj.CacheConfig(kind="offload", route="dynamic_slice", device_blocks=8)


@pytest.fixture(scope="module")
def worded(lm, text_lm):
    return dataclasses.replace(lm, config=text_lm.config, tokenizer=text_lm.tokenizer)


def _requests(token_ids, count: int) -> list[tuple[list[int], sj.GenerateConfig]]:
    random = np.random.default_rng(3)
    found = []
    for index in range(count):
        config = sj.GenerateConfig(
            max_new_tokens=int(random.integers(1, 40)),
            temperature=float(random.choice([0.0, 0.9, 1.5])),
            top_k=int(random.choice([0, 20])),
            repetition_penalty=float(random.choice([1.0, 1.2])),
            seed=index,
            ignore_eos=bool(index % 2),
            stop=("e",) if index % 3 == 0 else (),
        )
        length = int(random.choice([1, 7, 128, 300, 460]))
        found.append((token_ids(length, seed=index), config))
    return found


def _serve(session: Session, requests, seed: int):
    """Runs all requests, each joining and leaving at its own time."""
    random = np.random.default_rng(seed)
    waiting, rows, outputs = list(range(len(requests))), {}, {}
    filling: set[int] = set()
    events: dict[int, list[sj.StreamEvent]] = {i: [] for i in waiting}
    while waiting or rows:
        if waiting and session.free and random.random() < 0.7:
            index = waiting.pop(int(random.integers(len(waiting))))
            row = session.join(requests[index][0], requests[index][1])
            rows[row] = index
            filling.add(row)
        if filling and random.random() < 0.8:
            row = int(random.choice(sorted(filling)))
            if session.prefill(row):
                filling.discard(row)
        session.decode(int(random.integers(1, 6)))
        for event in session.take_events():
            events[rows[event.index]].append(event)
        running = set(session.running) | filling
        for row in [row for row in rows if row not in running]:
            if random.random() < 0.6:
                index = rows.pop(row)
                outputs[index] = session.leave(row)
    return outputs, events


def _check(lm, token_ids, count, caches):
    requests = _requests(token_ids, count)
    alone = [sj.generate(lm, [prompt], config) for prompt, config in requests]
    for cache in caches:
        placed = dataclasses.replace(lm, cache=cache)
        session = Session.open(
            placed, rows=3, max_context=640, max_new_tokens=64, prefill_chunk=128
        )
        session.warm_up()
        before = PROGRAMS.compiled
        for seed in range(2):
            outputs, events = _serve(session, requests, seed)
            for index, expected in enumerate(alone):
                found = outputs[index]
                assert found.tokens == expected.tokens[0], (cache.kind, index)
                assert found.text == expected.texts[0]
                assert found.finish_reason == expected.finish_reasons[0]
                told = [e.token for e in events[index] if e.token >= 0]
                assert told == found.tokens
                assert "".join(e.text for e in events[index]) == found.text
        assert PROGRAMS.compiled == before
        assert session.free == [0, 1, 2] and session.running == []


@pytest.mark.slow
@pytest.mark.long  # in a server: `test_random_requests_get_what_generate_gives`
def test_rows_join_and_leave_as_if_each_were_alone(worded, token_ids):
    """Sampled and greedy, prompts in pieces between decode steps, stop strings."""
    _check(worded, token_ids, 6, [OFFLOAD])


@pytest.mark.slow
@pytest.mark.long  # a few: `test_random_requests_get_what_generate_gives`
@pytest.mark.parametrize("count", [12, 40])
def test_many_rows_join_and_leave(worded, token_ids, count):
    verify = dataclasses.replace(OFFLOAD, exactness="verify", layer0="offload")
    plain = dataclasses.replace(worded, selector=worded.selector)
    _check(plain, token_ids, count, [sj.CacheConfig(), OFFLOAD])
    own = sj.with_attention(worded, "infllm_v2")
    _check(own, token_ids, 12, [sj.CacheConfig(), OFFLOAD])
    alone = dataclasses.replace(worded, cache=sj.CacheConfig(exactness="verify"))
    _check(alone, token_ids, 12, [verify])


def test_a_row_has_room_for_its_context_and_no_more(lm, token_ids):
    """However long outputs may be; both ends of what fits are what `generate` gives."""
    session = Session.open(lm, rows=1, max_context=256, max_new_tokens=200)
    assert session.shapes.capacity == 256
    for new in (200, 1):
        prompt = token_ids(256 - new, seed=new)
        options = {"max_new_tokens": new, "ignore_eos": True}
        row = session.join(prompt, **options)
        while not session.prefill(row):
            pass
        session.decode(new)
        alone = sj.generate(lm, [prompt], **options)
        assert session.leave(row).tokens == alone.tokens[0]


def test_requests_of_other_steps_are_the_same_arrays(lm):
    """A GPU records its graphs anew where an array lies elsewhere than before."""
    session = Session.open(lm, rows=2, max_context=256, max_new_tokens=60)
    session.join([1], max_new_tokens=5)
    for row in (None, 0):
        one, other = (session.request(steps, row=row) for steps in (4, 7))
        assert (int(one.steps), int(other.steps)) == (4, 7)
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        assert sum(a is not b for a, b in pairs) == 1
        assert session.request(4, row=row) is one
        # A prompt that goes on samples nothing, and changes nothing of the others.
        nothing = session.request(0, row=row, ends=[False] * len(one.max_new))
        assert not np.any(nothing.max_new)
        assert session.request(9, row=row).max_new is one.max_new
    session.join([2], max_new_tokens=9)
    assert np.asarray(session.request(4).max_new).tolist() == [5, 9]


def test_what_a_session_refuses(lm):
    session = Session.open(lm, rows=1, max_context=256, max_new_tokens=60)
    for arguments, named in (
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [5] * 250}, "prompt has 250 tokens.*at most 256 fit a row"),
        ({"prompt": [5], "max_new_tokens": 61}, "max_new_tokens=61.*at most 60"),
        ({"prompt": [5], "n": 2}, "n=2"),
        ({"prompt": [5], "seed": [1, 2]}, "seed"),
        ({"prompt": [5], "stop_ids": [999]}, "stop_ids holds 999"),
    ):
        with pytest.raises(ConfigError, match=named):
            session.join(**{"max_new_tokens": 8, **arguments})
    assert session.free == [0]
    row = session.join([5, 6], max_new_tokens=8)
    for name in ("prefill", "leave", "cached_tokens", "prompt_logprobs"):
        with pytest.raises(ConfigError, match="row=False is not allowed"):
            getattr(session, name)(False)
    with pytest.raises(ConfigError, match="steps=-1 is not allowed"):
        session.decode(-1)
    with pytest.raises(ConfigError, match="no row is free: all 1 are taken"):
        session.join([5], max_new_tokens=8)
    with pytest.raises(ConfigError, match="row=1"):
        session.leave(1)
    with pytest.raises(ConfigError, match="row=1"):
        session.prefill(1)
    with pytest.raises(ConfigError, match="before requests join"):
        session.warm_up()
    assert row == 0
    for arguments, named in (
        ({"rows": 0}, "rows=0"),
        ({"rows": 1, "max_context": 10**6}, "max_context=1000000"),
        ({"rows": 1, "prefill_chunk": 0}, "prefill_chunk=0"),
    ):
        with pytest.raises(ConfigError, match=named):
            Session.open(lm, **arguments)


@pytest.mark.slow
@pytest.mark.long  # as lm-eval gets them from a server: `test_lm_eval`
def test_log_probabilities_are_those_of_the_model(worded, token_ids):
    """Of a prompt in pieces as `forward` has them, of output tokens as it has next."""
    plain = dataclasses.replace(worded, cache=sj.CacheConfig())
    session = Session.open(
        plain,
        rows=2,
        max_context=640,
        max_new_tokens=64,
        prefill_chunk=128,
        top_logprobs=3,
    )
    session.warm_up()
    prompt = token_ids(300)
    other = session.join(token_ids(40, seed=2), max_new_tokens=8, ignore_eos=True)
    session.prefill(other)
    options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    row = session.join(prompt, logprobs=True, score_prompt=True, **options)
    while not session.prefill(row):
        session.decode(1)
    while row in session.running:
        session.decode(2)
    events = [event for event in session.take_events() if event.index == row]
    tokens = [event.token for event in events]
    assert tokens == sj.generate(plain, [prompt], **options).tokens[0]
    expected = np.asarray(
        jax.nn.log_softmax(sj.forward(plain, [*prompt, *tokens]), axis=-1)
    )
    found = [*session.prompt_logprobs(row), *(event.logs for event in events)]
    assert [log.token for log in found] == [*prompt[1:], *tokens]
    for place, log in enumerate(found):
        scores = expected[place]
        np.testing.assert_allclose(log.logprob, scores[log.token], atol=1e-4)
        best = np.sort(scores)[::-1][:3]
        np.testing.assert_allclose([p for _, p in log.top], best, atol=1e-4)
        assert all(abs(scores[token] - p) < 1e-4 for token, p in log.top)
    assert session.prompt_logprobs(other) == []


def test_a_row_does_not_end_before_its_least_length(text_lm):
    free = sj.generate(text_lm, [[5, 6, 7]], max_new_tokens=12, ignore_eos=True)
    first = free.tokens[0][0]
    options = {"max_new_tokens": 12, "stop_ids": [first], "ignore_eos": True}
    assert sj.generate(text_lm, [[5, 6, 7]], **options).tokens == [[first]]
    later = sj.generate(text_lm, [[5, 6, 7]], min_new_tokens=4, **options)
    assert first not in later.tokens[0][:4] and len(later.tokens[0]) > 4
    word = free.texts[0][:1]
    options = {"max_new_tokens": 12, "ignore_eos": True, "stop": word}
    assert sj.generate(text_lm, [[5, 6, 7]], **options).texts == [""]
    shown = sj.generate(text_lm, [[5, 6, 7]], include_stop=True, **options)
    assert shown.texts == [word]
    whole = sj.generate(text_lm, [[5, 6, 7]], min_new_tokens=12, **options)
    assert whole.tokens == free.tokens and whole.texts == free.texts
    with pytest.raises(ConfigError, match="min_new_tokens=13"):
        sj.GenerateConfig(min_new_tokens=13, max_new_tokens=12)
