"""The process: sockets with limits of time and number, signals, the end."""

import asyncio
import logging
import socket
import sys
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from sparda_jax.checks import ConfigError, shown
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.session import Session
from sparda_jax.serving.app import Server
from sparda_jax.serving.metrics import LOGGER, Metrics
from sparda_jax.serving.scheduler import Scheduler
from sparda_jax.serving.settings import ServeSettings

# Bytes of a request's line and headers; more is an answer of 400.
_MOST_HEADER_BYTES = 64 * 1024


class _Impatient(H11Protocol):
    """A connection that is closed when its client is slow to ask or to take an answer.

    Or when it is one too many.
    """

    client_timeout = 30.0
    max_connections = 4096
    _timer: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # pyrefly: ignore
        """As `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As `asyncio.Protocol`."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Called by uvicorn: the next request has its time as well."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As `asyncio.Protocol`."""
        self._unwatch()
        self._unstick()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """As `asyncio.Protocol`: what was sent is not taken."""
        super().pause_writing()
        self._unstick()
        self._stuck = self.loop.call_later(self.client_timeout, self._expire)

    def resume_writing(self) -> None:
        """As `asyncio.Protocol`."""
        self._unstick()
        super().resume_writing()

    def _watch(self) -> None:
        """Bounds the time to a whole head; an answer may take as long as it does."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.client_timeout, self._expire)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _expire(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Tells the scheduler of a signal at once: open requests end, or are ended."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, *, abort: bool):
        super().__init__(config)
        self._scheduler, self._abort_jobs = scheduler, abort

    def handle_exit(self, sig: int, frame: Any) -> None:
        """As uvicorn's; a second signal ends what the first let finish."""
        self._scheduler.drain(abort=self._abort_jobs or self.should_exit)
        super().handle_exit(sig, frame)


class Serving:
    """A model that is served.

    Attributes:
      session: Its rows.
      scheduler: Who runs when.
      settings: What the server was told.

    Args:
      lm: A loaded model.
      settings: What to do.

    Raises:
      ConfigError: If the settings cannot be served on this device.
    """

    def __init__(self, lm: LanguageModel, settings: ServeSettings):
        context = settings.max_context or lm.config.max_context
        self.session = Session.open(
            lm,
            rows=settings.max_batch,
            max_context=settings.max_context,
            max_new_tokens=min(settings.max_new_tokens, max(context - 1, 1)),
            prefill_chunk=settings.prefill_chunk,
            top_logprobs=settings.top_logprobs,
            prefix_bytes=settings.prefix_bytes,
        )
        self.settings = settings
        self._metrics = Metrics(settings.model_name, self.session)
        self.scheduler = Scheduler(
            self.session,
            self._metrics,
            max_waiting=settings.max_waiting,
            decode_steps=settings.decode_steps,
        )

    def warm_up(self) -> list[str]:
        """Compiles all that requests need; returns the programs' names."""
        self.session.warm_up()
        return self.session.programs

    def app(self) -> ASGIApp:
        """The ASGI application, for other servers; `scheduler.start` comes first."""
        endpoints = Server(self.session, self.scheduler, self._metrics, self.settings)
        return endpoints.app()

    def uvicorn(self, host: str, port: int) -> uvicorn.Server:
        """The HTTP server, which is not running yet; `scheduler.start` comes first.

        Args:
          host, port: Where to listen; port 0 takes a free one.
        """
        settings = self.settings
        limits = {
            "client_timeout": settings.client_timeout,
            "max_connections": settings.max_connections,
        }
        config = uvicorn.Config(
            cast(Any, self.app()),
            host=host,
            port=port,
            http=cast(Any, type("Impatient", (_Impatient,), limits)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            timeout_keep_alive=int(max(settings.client_timeout, 1)),
        )
        abort = settings.on_term == "abort"
        return _Uvicorn(config, self.scheduler, abort=abort)


def bind(host: str, port: int) -> socket.socket:
    """Takes an address, for this process alone; who connects waits for `uvicorn`.

    Args:
      host: A name or an address, of version 4 or 6.
      port: 0 takes a free one.

    Raises:
      ConfigError: If the address is in use, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        # Two processes may bind the same address until one of them listens.
        taken.listen()
    # The last two: names that no machine has, too long or with a null character.
    except (OSError, ValueError, TypeError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host={shown(host)}, port={port} cannot be listened at: {reason}"
        ) from error
    return taken


def url_of(taken: socket.socket) -> str:
    """The address of a socket of `bind`, as a browser takes it."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """One line of JSON an event, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
