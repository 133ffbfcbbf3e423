"""Rows that join and leave a running batch: each as if it were alone."""

import dataclasses

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.checks import ConfigError
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.session import Session

SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)
OFFLOAD = sj.CacheConfig(kind="offload", route="dynamic_slice", device_blocks=8)


@pytest.fixture(scope="module")
def lm(text_lm):
    model = sj.load(
        "tiny",
        attention="sparda",
        forecast="from_query",
        sparse=SPARSE,
        storage="stacked",
    )
    return dataclasses.replace(
        model, config=text_lm.config, tokenizer=text_lm.tokenizer
    )


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


def test_rows_join_and_leave_as_if_each_were_alone(lm, token_ids):
    """Sampled and greedy, prompts in pieces between decode steps, stop strings."""
    _check(lm, token_ids, 6, [OFFLOAD])


@pytest.mark.slow
def test_many_rows_join_and_leave(lm, token_ids):
    verify = dataclasses.replace(OFFLOAD, exactness="verify", layer0="offload")
    plain = dataclasses.replace(lm, selector=lm.selector)
    _check(plain, token_ids, 40, [sj.CacheConfig(), OFFLOAD])
    own = sj.with_attention(lm, "infllm_v2")
    _check(own, token_ids, 12, [sj.CacheConfig(), OFFLOAD])
    alone = dataclasses.replace(lm, cache=sj.CacheConfig(exactness="verify"))
    _check(alone, token_ids, 12, [verify])


def test_what_a_session_refuses(lm):
    session = Session.open(lm, rows=1, max_context=256, max_new_tokens=64)
    for arguments, named in (
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [5] * 250}, "prompt has 250 tokens.*at most 256 fit a row"),
        ({"prompt": [5], "max_new_tokens": 65}, "max_new_tokens=65.*at most 64"),
        ({"prompt": [5], "n": 2}, "n=2"),
        ({"prompt": [5], "seed": [1, 2]}, "seed"),
        ({"prompt": [5], "stop_ids": [999]}, "stop_ids holds 999"),
    ):
        with pytest.raises(ConfigError, match=named):
            session.join(**{"max_new_tokens": 8, **arguments})
    assert session.free == [0]
    row = session.join([5, 6], max_new_tokens=8)
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
