"""A client that sends whatever it is told to."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from patience import PATIENCE

KEY = "a-secret"
# Bodies of /v1/completions that no server takes, and how it answers.
MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 10_000, 400),
    (b"{}", 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [5, -1]}', 400),
    (b'{"prompt": [5], "max_tokens": -3}', 400),
    (b'{"prompt": [5], "temperature": NaN}', 400),
    (b'{"prompt": [5], "n": 1000000}', 400),
    (b'{"prompt": [5], "model": "other"}', 404),
    (b'{"prompt": [5], "colour": "red"}', 400),
    (b'{"prompt": [' + b"5, " * 700 + b"5]}", 400),
    (b" " * 300_000, 413),
]


def connect(server: Any) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)


def post(
    server: Any, path: str, body: object, *, method: str | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and JSON of an answer; None asks by GET, bytes go as they are."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Authorization": f"Bearer {KEY}", **headers}
    connection = connect(server)
    try:
        method = method or ("GET" if data is None else "POST")
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        read = answer.read()
        return answer.status, json.loads(read) if read else None
    finally:
        connection.close()


@dataclasses.dataclass(frozen=True)
class ServeProcess:
    """`sparda serve` on a port of this machine."""

    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serve_process(*words: str, **environment: str) -> Iterator[ServeProcess]:
    """A process that is ready for requests; it must end behind the block."""
    command = [sys.executable, "-m", "sparda_jax.cli", "serve", "--port", "0", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stderr is not None
        told = ""
        try:
            for line in process.stderr:
                told += line
                if found := re.search(r"on http://127.0.0.1:(\d+)$", line):
                    yield ServeProcess(process, int(found[1]))
                    process.stderr.read()
                    return
            raise AssertionError(told)
        except BaseException:
            process.kill()
            raise


def run_client(*command: str) -> str:
    """Output of a command that must succeed; it finds no models on a network."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": KEY,  # where lm-eval's requests look
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
