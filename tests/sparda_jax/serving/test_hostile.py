"""Bad input, bad clients, and what is left behind of them: nothing."""

import asyncio
import json
import socket
import threading

import pytest
from patience import PATIENCE, until
from serving_client import KEY, connect, post
from starlette.requests import ClientDisconnect

from sparda_jax.serving.jobs import Job

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"3", 400, "the body is 3"),
        ({}, 400, "prompt is missing"),
        ({"prompt": 3}, 400, "prompt=3"),
        ({"prompt": []}, 400, "holds 0 prompts"),
        ({"prompt": [[]]}, 400, r"prompt\[0\] is empty"),
        ({"prompt": [5, -1]}, 400, "-1"),
        ({"prompt": [5, 10**9]}, 400, "token id 1000000000"),
        ({"prompt": ["a", 5]}, 400, r"prompt\[1\]"),
        ({"prompt": "a\ud800"}, 400, "Unicode"),
        ({**BODY, "max_tokens": -1}, 400, "max_tokens=-1"),
        ({**BODY, "max_tokens": 0}, 400, "max_tokens=0"),
        ({**BODY, "max_tokens": 65}, 400, "max_new_tokens=65.*at most 64"),
        ({**BODY, "max_tokens": 1.5}, 400, "max_tokens=1.5"),
        ({**BODY, "min_tokens": 5}, 400, "min_new_tokens=5"),
        ({**BODY, "temperature": "hot"}, 400, "temperature='hot'"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=nan"),
        ({**BODY, "top_p": 0}, 400, "top_p=0"),
        ({**BODY, "n": 0}, 400, "n=0"),
        ({**BODY, "n": 10**6}, 400, "n=1000000"),
        ({**BODY, "stop": [3]}, 400, r"stop\[0\]"),
        ({**BODY, "stop_token_ids": [999]}, 400, "stop_ids holds 999"),
        ({**BODY, "logprobs": 6}, 400, "logprobs=6.*at most 5"),
        ({**BODY, "model": "other"}, 404, "does not exist"),
        ({**BODY, "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({**BODY, "colour": "red"}, 400, "'colour' is no field"),
        ({**BODY, "stream_options": {"x": 1}}, 400, "'x' is no field"),
        ({"prompt": [5] * 700}, 400, "prompt has 700 tokens.*at most 640"),
        (b" " * 300_000, 413, "at most 200000 bytes"),
    ],
)
def test_a_bad_body_is_one_line(server, body, status, named):
    import re

    found, answer = post(server, "/v1/completions", body)
    assert found == status, answer
    error = answer["error"]
    assert re.search(named, error["message"]) and "\n" not in error["message"]
    assert len(error["message"]) < 1000 and error["type"] == "invalid_request_error"


CHAT = {"messages": [{"role": "user", "content": "a"}]}


def test_bad_chats(server):
    for body, named in (
        ({}, "messages=None"),
        ({"messages": [3]}, "messages[0]=3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ({"messages": [{"role": 3, "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            "top_logprobs",
        ),
        *(
            ({**CHAT, "chat_template_kwargs": {name: value}}, name)
            for name, value in (
                ("messages", [3]),
                ("self", 3),
                ("answer_prefix", 3),
                ("add_generation_prompt", 3),
                ("tokenize", True),
            )
        ),
    ):
        status, answer = post(server, "/v1/chat/completions", body)
        assert status == 400 and named in answer["error"]["message"], answer


def test_paths_and_keys(server):
    assert post(server, "/nowhere", None)[0] == 404
    assert post(server, "/v1/completions", None)[0] == 405
    assert post(server, "/v1/requests/none", None, method="DELETE")[0] == 404
    for given in ("", "Bearer", "Bearer b", f"Basic {KEY}", f"Bearer {KEY}x"):
        status, answer = post(server, "/v1/models", None, Authorization=given)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert post(server, "/health", None, Authorization="")[0] == 200


def _send(server, data: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    made.sendall(data)
    return made


def _head(length: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_slow_and_half_open_clients_are_let_go(server, impatient):
    """No byte, half a head, half a body: closed after `client_timeout`."""
    hasty, _ = impatient
    silent = _send(hasty, b"")
    half = _send(hasty, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-")
    body = _send(hasty, _head(100) + b'{"prompt"')
    try:
        assert silent.recv(100) == b"" and half.recv(100) == b""
    except ConnectionResetError:
        pass
    assert b"408" in body.recv(1000)
    flood = _send(server, b"GET /health HTTP/1.1\r\nHost: a\r\n")
    try:
        for number in range(100):
            flood.sendall(f"X-{number}: {'a' * 1000}\r\n".encode())
        assert b"400" in flood.recv(1000)
    except (ConnectionResetError, BrokenPipeError):
        pass
    for one in (silent, half, body, flood):
        one.close()
    assert all(post(one, "/health", None)[0] == 200 for one in (server, hasty))


def test_a_body_of_100_megabytes_is_refused_before_it_has_come(server):
    """By its length; and without one, when it has become too long."""
    told = _send(server, _head(100 * 2**20) + b" " * 2**16)
    assert b" 413 " in told.recv(1000)
    head = _head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    untold = _send(server, head)
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    untold.sendall(chunk * 4)
    assert b" 413 " in untold.recv(1000)
    for one in (told, untold):
        one.close()


def test_who_does_not_take_an_answer_is_let_go(impatient):
    """More than the sockets hold stands in the server's buffer, but not for long."""
    hasty, http = impatient
    prompt = json.dumps({"prompt": "ab the " * 25_000}).encode()
    head = _head(len(prompt)).replace(b"/v1/completions", b"/tokenize")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(PATIENCE)
    client.connect(("127.0.0.1", hasty.port))
    client.sendall(head + prompt)
    begin = client.recv(500)
    length = int(begin.partition(b"content-length: ")[2].split(b"\r\n")[0])
    until(lambda: not http.server_state.connections)
    taken = len(begin)
    try:
        while piece := client.recv(65536):
            taken += len(piece)
    except ConnectionResetError:
        pass
    client.close()
    assert taken < length


def test_whoever_goes_frees_the_row(server, monkeypatch):
    """Clients that close their socket, streaming or not, and DELETE."""
    session, scheduler = server.serving.session, server.serving.scheduler
    server.settle()
    asked, submit = threading.Event(), scheduler.submit

    def submitted(jobs: list[Job]) -> None:
        submit(jobs)
        asked.set()

    monkeypatch.setattr(scheduler, "submit", submitted)
    body = {**BODY, "max_tokens": 60, "ignore_eos": True, "n": 3}
    for stream in (False, True):
        data = json.dumps({**body, "stream": stream}).encode()
        client = _send(server, _head(len(data)) + data)
        if stream:
            assert b"200 OK" in client.recv(1000)
        else:
            # They may have ended before anybody looked.
            until(lambda: scheduler.rows() or (asked.is_set() and scheduler.idle))
        client.close()
        server.settle()
        assert len(session.free) == 3
    answers = []

    def ask() -> None:
        answers.append(
            post(server, "/v1/completions", body, **{"x-request-id": "mine"})
        )

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: scheduler.rows() or answers)
    status, _ = post(server, "/v1/requests/mine", None, method="DELETE")
    thread.join()
    server.settle()
    assert len(session.free) == 3
    # It may have ended by itself before.
    assert (status, answers[0][0]) in ((200, 499), (404, 200))


def test_a_client_that_goes_before_the_first_event_is_known_to_be_gone(
    server, monkeypatch
):
    """No event is ever asked for then: the answer's own end would never come."""
    submitted: list[Job] = []
    monkeypatch.setattr(server.serving.scheduler, "submit", submitted.extend)
    body = json.dumps({**BODY, "stream": True, "n": 2}).encode()
    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {KEY}".encode())],
    }

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: dict) -> None:
        raise OSError("the socket is closed")

    with pytest.raises(ClientDisconnect):
        asyncio.run(server.serving.app()(scope, receive, send))
    assert len(submitted) == 2 and all(job.cancelled for job in submitted)


def test_nothing_is_left_behind(server):
    server.settle()
    threads = threading.active_count()
    for index in range(6):
        post(server, "/v1/completions", {**BODY, "prompt": [index + 3] * 9})
        connection = connect(server)
        connection.request("GET", "/health")
        connection.close()
    server.settle()
    # Workers of the thread pool come and stay, up to a bound; nothing else does.
    names = {t.name for t in threading.enumerate() if "asyncio_" not in t.name}
    assert threading.active_count() <= threads + 6
    assert sum(name == "sparda-engine" for name in names) == 1
    assert server.serving.session.free == [0, 1, 2]
    assert server.serving.session.held_tokens() == [0, 0, 0]
