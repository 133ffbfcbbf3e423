"""Soaking: requests come back from their number, and every fault is found and named."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.cli import soak as cli_soak
from sparda_jax.cli.main import main
from sparda_jax.evaluation import soak as soaking
from sparda_jax.evaluation.soak import draw, sizes_of, soak
from sparda_jax.inference.shapes import capacity_blocks


@pytest.fixture(scope="module")
def lms():
    """The tiny model, offloaded and resident."""
    lm = sj.load("tiny", attention="infllm_v2", storage="stacked")
    return dataclasses.replace(
        lm, cache=sj.CacheConfig(kind="offload", device_blocks=None)
    ), lm


@pytest.fixture(scope="module")
def sizes(lms):
    return sizes_of(lms[0], 256, 8)


def _answer(lm, request):
    """Tokens that depend on the request alone."""
    return [[len(row), request.seed] for row in request.prompts]


def _soak(lms, sizes, run, **options):
    return soak(*lms, sizes, seed=1, seconds=600.0, run=run, **options)


def test_requests_come_back_and_reach_every_kind(sizes):
    requests = [draw(number, 5, sizes, 100) for number in range(200)]
    assert requests == [draw(number, 5, sizes, 100) for number in range(200)]
    assert requests[:20] != [draw(number, 6, sizes, 100) for number in range(20)]
    assert {r.kind for r in requests} == {"whole", "stop", "cancel", "turns"}
    assert {r.size for r in requests} == set(sizes)
    for r in requests:
        lengths = [len(row) for row in r.prompts]
        assert len(lengths) == r.size.rows and min(lengths) >= 1
        assert r.size.longest * 3 // 4 < max(lengths) <= r.size.longest
        assert max(max(row) for row in r.prompts) < 100
    assert len({len(r.prompts[0]) for r in requests}) > 50


def test_what_holds_is_reported(lms, sizes):
    report = _soak(lms, sizes, _answer, requests=20, check_every=4)
    assert report.problems == []
    assert (report.requests, report.checked, report.compiled) == (20, 5, 0)
    assert sum(report.kinds.values()) == 20
    assert report.live_bytes[0] == report.live_bytes[1] > 0


def test_enough_tokens_end_the_run(lms, sizes):
    whole = _soak(lms, sizes, _answer, requests=20)
    enough = _soak(lms, sizes, _answer, requests=20, tokens=whole.tokens // 2)
    assert 0 < enough.requests < whole.requests
    assert whole.tokens // 2 <= enough.tokens < whole.tokens


def test_a_difference_ends_the_run_and_comes_back_alone(lms, sizes):
    def wrong(lm, request):
        tokens = _answer(lm, request)
        if lm.cache.kind == "offload" and request.number == 6:
            tokens[-1][1] += 1
        return tokens

    report = _soak(lms, sizes, wrong, requests=20, check_every=2)
    assert report.requests == 7
    assert len(report.problems) == 1
    assert "request 6 (" in report.problems[0]
    assert "at token 1" in report.problems[0]
    alone = _soak(lms, sizes, wrong, only=6)
    assert alone.problems == report.problems
    assert _soak(lms, sizes, wrong, only=7).problems == []


def test_arrays_that_stay_are_found(lms, sizes):
    kept, count = [], itertools.count()

    def leaking(lm, request):
        if next(count) == 30:
            kept.append(soaking.jax.device_put(np.zeros(1000, np.float32)))
        return _answer(lm, request)

    report = _soak(lms, sizes, leaking, requests=60)
    assert len(report.problems) == 1
    assert "left 4000 bytes of arrays behind" in report.problems[0]


def test_programs_after_the_warm_up_are_found(lms, sizes, monkeypatch):
    def compiling(lm, request):
        if request.number == 6:
            soaking.PROGRAMS.compiled += 1
        return _answer(lm, request)

    monkeypatch.setattr(soaking, "_warm_up", lambda *_: iter(()))
    report = _soak(lms, sizes, compiling, requests=60)
    assert report.problems == ["request 6 compiled 1 programs after the warm-up"]


def test_the_warm_up_meets_caches_of_every_size():
    """A second turn behind a long first one takes sizes between the two ends too."""
    size = soaking.Size(3, 256, 400, 6)
    rooms = [
        capacity_blocks(-(-(256 + request.events // 3 + 401) // 64))
        for request in soaking._warm_up(1, [size], 100, 64)
        if request.kind == "turns"
    ]
    assert set(rooms) == {12, 16, 24} and len(rooms) == 3
    short = soaking.Size(3, 256, 24, 6)
    assert len(list(soaking._warm_up(1, [short], 100, 64))) == 4


def test_a_process_that_grows_is_found(lms, sizes, monkeypatch):
    steps = itertools.count()
    monkeypatch.setattr(soaking, "_rss", lambda: 10**9 + 10**7 * next(steps))
    report = _soak(lms, sizes, _answer, requests=100)
    assert len(report.problems) == 1
    assert "the process grew from" in report.problems[0]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_says_how_to_get_there_again(capsys, monkeypatch, lms, wrong):
    def soaked(*arguments, **named):
        run = _answer
        if wrong:

            def run(lm, request):
                return [[int(lm.cache.kind == "offload")]]

        return soak(*arguments, **named, run=run)

    monkeypatch.setattr(cli_soak, "load_model", lambda *_: lms[1])
    monkeypatch.setattr(cli_soak, "soak", soaked)
    command = ["soak", "--json", "--requests", "3", "--seed", "4", "--context", "256"]
    if not wrong:
        assert main(command) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert bool(report["problems"]) == wrong
    assert ("(--seed 4)" in err) == wrong
    if wrong:
        assert "request 0 (" in err


def test_a_context_that_is_too_long_is_refused(capsys, monkeypatch, lms):
    monkeypatch.setattr(cli_soak, "load_model", lambda *_: lms[1])
    assert main(["soak", "--context", "1000000"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--context=1000000 is not allowed: it must be at most" in err
    assert main(["soak", "--new", "2000000000"]) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"--new=2000000000 is not allowed: it must be at most \d+ for", err
    )


@pytest.mark.slow
@pytest.mark.long  # one request of it: `test_commands_run`
def test_a_short_soak(capsys):
    """The real thing, a tiny model: nothing differs, nothing is compiled or kept."""
    command = ["soak", "--model", "tiny", "--forecast", "from_query", "--json"]
    command += ["--requests", "30", "--context", "256", "--check-every", "3"]
    assert main([*command, "--no-compilation-cache"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], report["compiled"]) == ([], 0)
    assert (report["requests"], report["checked"]) == (30, 10)
    assert set(report["kinds"]) == {"whole", "stop", "cancel", "turns"}
