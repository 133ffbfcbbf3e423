"""`sparda bench serve`: figures of requests, those that failed among them."""

import asyncio
import json
import math
import subprocess
import time
from typing import Any

import pytest

from benchmarks import load_here
from benchmarks.bench import main
from benchmarks.load import ask, bodies, build_parser, run_load
from benchmarks.load_figures import (
    Result,
    figures,
    full_batch_rate,
    percentiles,
    steadiness,
)
from sparda_jax.checks import ConfigError


def test_what_never_came_stands_in_the_percentiles():
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    found = percentiles([0.1, math.inf, 0.3, 0.2])
    assert found == {"p50": 0.2, "p90": None, "p99": None}
    good = Result(0.0, times=[1.0, 1.5, 2.0], ended=2.25, tokens=3, cached=4)
    bad = Result(0.0, times=[1.0], failure="500")
    gone = Result(0.0, times=[1.0], cancelled=True)
    told = figures([good, bad, gone], seconds=10.0, rows=2)
    assert (told["completed"], told["failed"], told["cancelled"]) == (1, 1, 1)
    assert told["output_tokens_per_second"] == 0.5 and told["cached_tokens"] == 4
    assert told["first_token_seconds"] == {"p50": 1.0, "p90": None, "p99": None}
    assert told["between_tokens_seconds"]["p50"] == 0.5
    assert told["longest_pause_seconds"] == {"p50": 0.5, "p90": None, "p99": None}
    assert told["whole_seconds"] == {"p50": 2.25, "p90": None, "p99": None}


@pytest.mark.parametrize("status", [0, 1, 2])
def test_users_that_leave_no_figures_are_one_line(monkeypatch, status):
    done = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    arguments = build_parser().parse_args([])
    with pytest.raises(ConfigError, match=f"ended with status {status} and no"):
        load_here._users(arguments, "http://127.0.0.1:1", 100, {})


def test_the_rate_of_full_rows_counts_only_while_all_are_taken():
    first = Result(0.0, times=[1.0, 2.0, 3.0, 4.0])
    second = Result(0.0, times=[2.5, 3.5, 4.5, 5.5])
    third = Result(0.0, times=[8.0, 9.0])
    # From 3.5 to 4: half of the one at 4, and half of the one at 4.5.
    assert full_batch_rate([first, second, third], rows=2) == 2.0
    assert full_batch_rate([first, second, third], rows=3) is None
    # Who comes when another goes: from 5 to 5.25, one of its own and a quarter of one.
    late = Result(0.0, times=[4.5, 5.0, 5.25])
    assert full_batch_rate([first, second, late], rows=2) == 3.0


def test_the_piece_of_a_prompt_that_others_waited_for_is_no_part_of_it():
    first = Result(
        0.0, times=[0.0, *(at for at in (1.0, 2.0, 2.5, 3.0) for _ in "abcd")]
    )
    second = Result(0.0, times=[1.5, *(at for at in (2.0, 2.5, 3.0) for _ in "abcd")])
    assert full_batch_rate([first, second], rows=2) == 16.0


def test_tokens_of_the_call_in_which_the_first_row_ends_count_for_all_rows():
    """Those of the other rows come a moment behind its last."""

    def came(late: float) -> Result:
        return Result(0.0, times=[0.0, *(call + late for call in (1, 2) for _ in "ab")])

    # Four calls of two rows in two seconds, of two tokens each.
    assert full_batch_rate([came(0.0), came(0.001)], rows=2) == pytest.approx(4, 1e-2)


def test_shares_are_told_as_far_as_they_are_measured():
    found: dict[str, Any] = {"generate": {"decode_tokens_per_second": 50.0}}
    assert load_here.shares(found, 2) == {}
    found["engine"] = {
        "rows_1": {"decode_tokens_per_second": 48.0},
        "rows_2": {"decode_tokens_per_second": 80.0},
    }
    assert load_here.shares(found, 2) == {"engine_row_of_generate": 0.96}
    found["one_user"] = {"between_tokens_seconds": {"p50": 1 / 47}}
    found["load"] = {"full_batch_tokens_per_second": None}
    assert load_here.shares(found, 2) == {
        "engine_row_of_generate": 0.96,
        "one_user_of_generate": 0.94,
        "one_user_of_engine": 0.9792,
    }
    found["load"] = {"full_batch_tokens_per_second": 78.0}
    assert load_here.shares(found, 2)["full_batch_of_engine"] == 0.975


def test_who_asks_the_same_is_watched():
    assert steadiness([Result(0.0, text="a")]) is None
    first = Result(0.0, fixed=True, text="a b", logprobs=[-1.0, -2.0])
    again = Result(0.0, fixed=True, text="a b", logprobs=[-1.0, -2.25])
    other = Result(0.0, fixed=True, text="a c", logprobs=[-1.0, -2.0])
    gone = Result(0.0, fixed=True, failure="503")
    assert steadiness([first, again, Result(0.0, text="c"), other, gone]) == {
        "answers": 3,
        "changed": 1,
        "largest_difference": 0.25,
        "text": "a b",
    }
    options = ["--requests", "9", "--same-every", "4", "--warm-up", "2"]
    made = bodies(build_parser().parse_args(options), 50, "m")
    same = [n for n, body in enumerate(made[2:]) if "logprobs" in body]
    assert same == [0, 4, 8]
    assert made[2]["prompt"] == made[6]["prompt"] != made[7]["prompt"]
    options += ["--same-prompt", "The number is 7."]
    made = bodies(build_parser().parse_args(options), 50, "m")
    assert made[2]["prompt"] == made[10]["prompt"] == "The number is 7."


def _answer(reply: bytes) -> Result:
    """What `ask` makes of a server that says this."""

    async def run() -> Result:
        async def serve(reader, writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await ask(f"http://127.0.0.1:{port}", {"prompt": "a"}, "key")

    return asyncio.run(run())


def _chunks(*events: str) -> bytes:
    parts = [b"HTTP/1.1 200 OK\r\n\r\n"]
    for event in events:
        data = f"data: {event}\n\n".encode()
        parts.append(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    return b"".join(parts)


def test_answers_that_do_not_end_have_failed():
    token = json.dumps({"choices": [{"text": "a", "finish_reason": None}]})
    last = json.dumps({"choices": [{"text": "", "finish_reason": "length"}]})
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})
    end = b"0\r\n\r\n"
    whole = _answer(_chunks(token, token, last, usage, "[DONE]") + end)
    assert whole.failure is None and len(whole.times) == 2 and whole.tokens == 2
    assert _answer(_chunks(token) + end).failure == "the stream ended early"
    assert "ended early" in str(_answer(_chunks(token)).failure)
    error = json.dumps({"error": {"message": "broken"}})
    assert "broken" in str(_answer(_chunks(token, error, "[DONE]") + end).failure)
    for answer in (
        *("3", "[]", '"error"', "[" * 100_000, "{}", '{"choices": 3}'),
        *('{"choices": [{}]}', '{"choices": [], "usage": 3}', '{"choices": [[]]}'),
        '{"choices": [], "usage": {"completion_tokens": NaN}}',
        '{"choices": [], "usage": {"completion_tokens": -1}}',
    ):
        assert _answer(_chunks(token, answer, "[DONE]") + end).failure, answer
    assert _answer(b"HTTP/1.1 200 OK\r\n\r\nno number\r\n").failure
    assert _answer(b"").failure
    assert "503" in str(_answer(b"HTTP/1.1 503 X\r\n\r\nbusy").failure)
    assert asyncio.run(ask("http://127.0.0.1:9", {}, None)).failure is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--requests", "0"], "--requests=0"),
        (["--rate", "0"], "--rate=0"),
        (["--minutes", "0"], "--minutes=0"),
        (["--sweep", "0.5", "--sweep", "-1"], "--sweep=-1"),
        (["--cancel", "2"], "--cancel=2"),
        (["--shared-tokens", "300"], "--shared-tokens=300"),
        (["--rate", "1e-300"], "--rate=1e-300"),
        (["--prompt-tokens", "2000000000"], "--prompt-tokens=2000000000"),
        *(
            (["--url", url], "--url=")
            for url in (
                *("http://[", "http://h:x", "http://h:99999", "http://h:0", "h:80"),
                *("https://h", "http://", "http://h/a b", "http://h/\r\nA: b"),
                *("http://h?x=1", "http://u:p@h", "http://\xe9"),
            )
        ),
        (["--url", "http://h", "--api-key", "a\r\nB: c"], "--api-key="),
        (["--url", "http://h", "--json", "/no/such/f.json"], "/no/such/f.json"),
    ],
)
def test_bad_options_are_one_line(capsys, options, named):
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_memory_for_beginnings_is_counted_in_bytes():
    options = ["--prefix-bytes", str(2**34), "--max-batch", "16"]
    assert build_parser().parse_args(options).prefix_bytes == 2**34


def test_a_server_that_is_not_there_is_a_failure(capsys, tmp_path):
    where = ["--url", "http://127.0.0.1:9", "--json", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit) as stop:
        main(["serve", *where, "--requests", "2", "--warm-up", "0", "--sweep", "1e3"])
    assert stop.value.code == 1
    assert "0 completed, 2 failed" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["load"]["failed"] == written["load_at_1000_a_second"]["failed"] == 2


@pytest.mark.parametrize("more", [[], ["--rate", "1000"]])
def test_when_its_minutes_are_over_nothing_is_sent(monkeypatch, capsys, more):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    options = ["--requests", "90", "--warm-up", "0", "--minutes", "3", *more]
    arguments = build_parser().parse_args(options)
    requests = bodies(arguments, 50, "m")
    found, _ = asyncio.run(run_load(arguments, "http://127.0.0.1:9", requests, None))
    assert 0 < len(found) < 10
    assert (
        f"3 minutes are over: {len(found)} requests were sent"
        in capsys.readouterr().err
    )
