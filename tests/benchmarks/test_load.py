"""`sparda bench serve`: figures of requests, those that failed among them."""

import asyncio
import json
import math

import pytest

from benchmarks.bench import main
from benchmarks.load import Result, ask, figures, percentiles


def test_what_never_came_stands_in_the_percentiles():
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    found = percentiles([0.1, math.inf, 0.3, 0.2])
    assert found == {"p50": 0.2, "p90": None, "p99": None}
    good = Result(0.0, times=[1.0, 1.5, 2.0], ended=2.25, tokens=3, cached=4)
    bad = Result(0.0, times=[1.0], failure="500")
    gone = Result(0.0, times=[1.0], cancelled=True)
    told = figures([good, bad, gone], seconds=10.0)
    assert (told["completed"], told["failed"], told["cancelled"]) == (1, 1, 1)
    assert told["output_tokens_per_second"] == 0.5 and told["cached_tokens"] == 4
    assert told["first_token_seconds"] == {"p50": 1.0, "p90": None, "p99": None}
    assert told["between_tokens_seconds"]["p50"] == 0.5
    assert told["whole_seconds"] == {"p50": 2.25, "p90": None, "p99": None}


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
    assert "503" in str(_answer(b"HTTP/1.1 503 X\r\n\r\nbusy").failure)
    assert asyncio.run(ask("http://127.0.0.1:9", {}, None)).failure is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--requests", "0"], "--requests=0"),
        (["--rate", "0"], "--rate=0"),
        (["--cancel", "2"], "--cancel=2"),
        (["--shared-tokens", "300"], "--shared-tokens=300"),
    ],
)
def test_bad_options_are_one_line(capsys, options, named):
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
