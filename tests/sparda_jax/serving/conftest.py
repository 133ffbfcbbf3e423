"""A tiny model behind real sockets."""

import contextlib
import copy
import dataclasses
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from patience import PATIENCE, until
from serving_client import KEY
from text_model import text_lm, text_tokenizer

import sparda_jax as sj
from sparda_jax.serving.server import Serving
from sparda_jax.serving.settings import ServeSettings

__all__ = ["text_lm", "text_tokenizer"]
SETTINGS = ServeSettings(
    model_name="tiny-served",
    max_batch=3,
    max_context=640,
    max_new_tokens=64,
    prefill_chunk=128,
    top_logprobs=5,
    max_waiting=64,
    max_body_bytes=200_000,
    client_timeout=PATIENCE,
    api_key=KEY,
)


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is served on a port of this machine."""

    lm: sj.LanguageModel
    serving: Serving
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def settle(self) -> None:
        """Waits until no request runs or waits, as clients that have gone leave it."""
        until(lambda: self.serving.scheduler.idle, "the scheduler is not idle")


@contextlib.contextmanager
def listening(serving: Serving) -> Iterator[tuple[uvicorn.Server, int]]:
    """The HTTP server of it, and its port."""
    taken = socket.create_server(("127.0.0.1", 0))
    # Small buffers of the system: who does not read is noticed by the server's own.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**15)
    server = serving.uvicorn("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        until(lambda: server.started, "the server does not start")
        yield server, taken.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        taken.close()


@contextlib.contextmanager
def served(lm: sj.LanguageModel, settings: ServeSettings) -> Iterator[Served]:
    serving = Serving(lm, settings)
    serving.warm_up()
    serving.scheduler.start()
    try:
        with listening(serving) as (_, port):
            yield Served(lm, serving, port)
    finally:
        serving.scheduler.stop(abort=True)


@pytest.fixture(scope="module")
def serve_lm(request, lm):
    """SparDA with its KV in host memory; it ends at <|im_end|>."""
    text = request.getfixturevalue("text_lm")
    return dataclasses.replace(
        lm,
        config=text.config,
        tokenizer=text.tokenizer,
        cache=sj.CacheConfig(kind="offload", route="dynamic_slice", device_blocks=8),
    )


@pytest.fixture(scope="module")
def server(serve_lm):
    with served(serve_lm, SETTINGS) as found:
        yield found


@pytest.fixture
def impatient(server):
    """The same rows behind a port where clients have a second; its HTTP server too."""
    serving = copy.copy(server.serving)
    serving.settings = dataclasses.replace(serving.settings, client_timeout=1.0)
    with listening(serving) as (http, port):
        yield Served(server.lm, serving, port), http


@pytest.fixture
def serve_here():
    """`with serve_here(lm, settings) as server`: a server of other settings."""
    return served
