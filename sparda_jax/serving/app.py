"""The endpoints."""

import asyncio
import contextlib
import functools
import hashlib
import hmac
import importlib.resources
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sparda_jax import __version__
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError, flag, several, text
from sparda_jax.checks import integer as integer_check
from sparda_jax.engine.requests import encode_prompt
from sparda_jax.engine.session import Session
from sparda_jax.serving.answers import Answer, ApiError, error_of_end
from sparda_jax.serving.jobs import Ended, Job, Refused
from sparda_jax.serving.metrics import Metrics
from sparda_jax.serving.protocol import (
    ApiRequest,
    UnknownModel,
    known_fields,
    parse_chat,
    parse_completion,
    parse_messages,
)
from sparda_jax.serving.scheduler import Scheduler
from sparda_jax.serving.settings import ServeSettings

# Of a client: what else stands in a log line, or in a path, is ours.
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_OPEN = ("/health", "/live", "/version", "/")


class Guard:
    """Lets in who brings the key; answers errors in the API's form.

    Args:
      app: What lies behind.
      key: The key, or None.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        self._app = app
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        allowed = (
            scope["type"] != "http"
            or self._digest is None
            or scope["path"] in _OPEN
            or self._has_key(dict(scope["headers"]).get(b"authorization", b""))
        )
        if allowed:
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "a bearer token is needed", code="invalid_api_key")
        await _refusal(error)(scope, receive, send)

    def _has_key(self, header: bytes) -> bool:
        """Compares digests, in a time that says nothing of the key or its length."""
        kind, _, given = header.partition(b" ")
        assert self._digest is not None
        same = hmac.compare_digest(_digest(given.strip()), self._digest)
        return same and kind.lower() == b"bearer"


class _Events(StreamingResponse):
    """Server-sent events; forgotten as well if the client goes before the first."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        forget: Callable[[], None],
        headers: dict[str, str],
    ):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._forget = forget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._forget()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status)


class Server:
    """Endpoints over a scheduler.

    Args:
      session: The scheduler's; of it only what never changes is read here.
      scheduler: Runs the jobs.
      metrics: What /metrics and /status say.
      settings: What the server was told.
    """

    def __init__(
        self,
        session: Session,
        scheduler: Scheduler,
        metrics: Metrics,
        settings: ServeSettings,
    ):
        self._session, self._scheduler = session, scheduler
        self._metrics, self._settings = metrics, settings
        self._created = int(time.time())
        self._live: dict[str, list[Job]] = {}

    def app(self) -> ASGIApp:
        """The ASGI application."""
        post = functools.partial(Route, methods=["POST"])
        routes = [
            Route("/", self._page),
            Route("/status", self._status),
            Route("/health", self._health),
            Route("/live", self._alive),
            Route("/version", self._version),
            Route("/metrics", self._export),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            post("/v1/completions", self._completions),
            post("/v1/chat/completions", self._chat),
            Route("/v1/requests/{request_id}", self._delete, methods=["DELETE"]),
            post("/tokenize", self._tokenize),
            post("/detokenize", self._detokenize),
            Route("/tokenizer_info", self._tokenizer_info),
        ]
        inner = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: self._on_api_error,
                404: _on_http_error,
                405: _on_http_error,
                Exception: _on_failure,
            },
        )
        return Guard(inner, self._settings.api_key)

    async def _body(self, request: Request) -> Any:
        """The JSON of a body of bounded size that comes in bounded time."""
        most = self._settings.max_body_bytes
        length = request.headers.get("content-length", "")
        too_long = ApiError(
            413, f"the body must have at most {most} bytes", code="body_too_large"
        )
        if length.isdecimal() and int(length) > most:
            raise too_long
        found = bytearray()
        try:
            async with asyncio.timeout(self._settings.client_timeout):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        except ClientDisconnect:
            raise ApiError(499, "the client has gone") from None
        try:
            return await asyncio.to_thread(json.loads, found)
        except (ValueError, RecursionError) as error:
            line = str(error).partition("\n")[0][:200]
            raise ApiError(400, f"the body is no JSON: {line}") from None

    async def _checked(self, parse: Callable[..., Any], *args: Any, **named: Any):
        """Calls a parser in another thread; what it refuses becomes an `ApiError`."""
        try:
            return await asyncio.to_thread(parse, *args, **named)
        except UnknownModel as error:
            raise ApiError(404, str(error), code="model_not_found") from None
        except (ConfigError, CheckpointError) as error:
            raise ApiError(400, str(error)) from None

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def _answer(self, request: Request, parse: Callable[..., Any]) -> Response:
        arrived = time.monotonic()
        body = await self._body(request)
        asked: ApiRequest = await self._checked(
            parse,
            body,
            self._session,
            served=self._settings.model_name,
            most_logprobs=self._settings.top_logprobs,
        )
        request_id = self._request_id(request, chat=asked.chat)
        deliveries: asyncio.Queue = asyncio.Queue()
        jobs = self._jobs(asked, request_id, deliveries, arrived)
        try:
            self._scheduler.submit(jobs)
        except Refused as error:
            raise ApiError(503, str(error), "server_error", "overloaded") from None
        self._metrics.accepted(request_id, asked, time.monotonic() - arrived)
        self._live[request_id] = jobs
        tokenizer = self._session.lm.tokenizer
        answer = Answer(asked, request_id, self._settings.model_name, tokenizer)
        headers = {"x-request-id": request_id}
        if asked.stream:
            events = self._events(asked, answer, deliveries)
            forget = functools.partial(self._forget, request_id)
            return _Events(events, forget, headers)
        return await self._whole(request, answer, request_id, deliveries, headers)

    def _request_id(self, request: Request, *, chat: bool) -> str:
        """The client's own id where it is one and is free, else a new one."""
        given = request.headers.get("x-request-id", "")
        if _ID.fullmatch(given) and given not in self._live:
            return given
        return ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)

    def _jobs(
        self,
        asked: ApiRequest,
        request_id: str,
        deliveries: asyncio.Queue,
        arrived: float,
    ) -> list[Job]:
        """A job an output."""
        loop = asyncio.get_running_loop()
        timeout = self._settings.request_timeout
        jobs: list[Job] = []
        for prompt in asked.prompts:
            for config in asked.configs:
                index = len(jobs)
                job = Job(
                    request_id=request_id,
                    prompt=prompt,
                    config=config,
                    deliver=_deliver_to(loop, deliveries, index),
                    logprobs=asked.logprobs is not None,
                    score_prompt=asked.echo and asked.logprobs is not None,
                    deadline=None if timeout is None else arrived + timeout,
                    times={"arrived": arrived},
                )
                jobs.append(job)
        return jobs

    async def _whole(
        self,
        request: Request,
        answer: Answer,
        request_id: str,
        deliveries: asyncio.Queue,
        headers: dict[str, str],
    ) -> Response:
        """The answer in one body; ends the jobs if the client goes."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while not answer.complete:
                next_one = asyncio.ensure_future(deliveries.get())
                await asyncio.wait(
                    (next_one, gone), return_when=asyncio.FIRST_COMPLETED
                )
                if not next_one.done():
                    next_one.cancel()
                    raise ApiError(499, "the client has gone")
                index, what = next_one.result()
                if not isinstance(what, Ended):
                    answer.take(index, what)
                    continue
                error = error_of_end(what)
                if error is not None:
                    raise error
                answer.end(index, what)
        finally:
            gone.cancel()
            self._forget(request_id)
        body = await asyncio.to_thread(answer.body)
        return JSONResponse(body, headers=headers)

    async def _events(
        self,
        asked: ApiRequest,
        answer: Answer,
        deliveries: asyncio.Queue,
    ) -> AsyncIterator[bytes]:
        """The answer as events; who sends them ends the jobs if the client goes."""
        while not answer.complete:
            index, what = await deliveries.get()
            if not isinstance(what, Ended):
                # In one piece: each is a write to the socket.
                if chunks := [*map(_event, answer.chunks(index, what))]:
                    yield b"".join(chunks)
                continue
            error = error_of_end(what)
            if error is not None:
                yield _event(error.body())
                break
            yield b"".join(map(_event, answer.last_chunk(index, what)))
        if answer.complete and asked.usage:
            yield _event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    def _forget(self, request_id: str) -> None:
        """Nobody waits for a request any more."""
        self._scheduler.cancel(
            [job for job in self._live.pop(request_id, []) if not job.ended]
        )

    async def _delete(self, request: Request) -> Response:
        """Ends a request; its own client gets an error."""
        request_id = request.path_params["request_id"]
        jobs = self._live.get(request_id)
        if jobs is None:
            raise ApiError(404, f"no request {request_id[:128]!r} runs or waits")
        self._scheduler.end(jobs)
        return JSONResponse({"id": request_id, "deleted": True})

    async def _on_api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self._metrics.refused(request.url.path, error.status, error.message)
        return _refusal(error)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["model"] != self._settings.model_name:
            raise ApiError(404, "no such model", code="model_not_found")
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "sparda-jax",
            "max_model_len": self._session.max_context,
        }

    async def _health(self, _: Request) -> Response:
        """Ready: a request would be taken now."""
        state = self._state()
        status = 200 if state == "ready" else 503
        return JSONResponse({"status": state}, status_code=status)

    async def _alive(self, _: Request) -> Response:
        """Alive: the engine has not failed, though it may take no more requests."""
        failed = self._scheduler.failure is not None
        return JSONResponse(
            {"status": self._state()}, status_code=503 if failed else 200
        )

    def _state(self) -> str:
        if self._scheduler.failure is not None:
            return "failed"
        return "ready" if self._scheduler.accepts() else "stopping"

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _export(self, _: Request) -> Response:
        return Response(self._metrics.export(), media_type=self._metrics.content_type)

    async def _page(self, _: Request) -> Response:
        files = importlib.resources.files("sparda_jax.serving")
        return HTMLResponse((files / "status.html").read_text(encoding="utf-8"))

    async def _status(self, _: Request) -> Response:
        status = self._metrics.status(self._scheduler.rows())
        return JSONResponse({"state": self._state(), **status})

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSONResponse(await self._checked(self._tokenized, body))

    def _tokenized(self, body: object) -> dict[str, Any]:
        lm = self._session.lm
        fields = {
            "model": text,
            "prompt": text,
            "messages": parse_messages,
            "add_special_tokens": flag,
        }
        values = known_fields(body, fields)
        if "messages" in values and lm.tokenizer is not None:
            ids = lm.tokenizer.encode_chat(values["messages"])
        elif not values.get("add_special_tokens", True) and lm.tokenizer is not None:
            # As lm-eval asks: no BOS, and names of special tokens are those tokens.
            ids = lm.tokenizer.encode(values.get("prompt", ""), special=True)
        else:
            ids = encode_prompt(lm, values.get("prompt", ""), "prompt")
        limit = self._session.max_context
        return {"count": len(ids), "max_model_len": limit, "tokens": ids}

    async def _detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSONResponse({"prompt": await self._checked(self._detokenized, body)})

    def _detokenized(self, body: object) -> str:
        ids = several(integer_check(0), "token ids")
        values = known_fields(body, {"model": text, "tokens": ids})
        tokenizer = self._session.lm.tokenizer
        if tokenizer is None:
            raise ConfigError(self._session.lm.no_tokenizer)
        return tokenizer.decode(values.get("tokens", ()), skip_special=False)

    async def _tokenizer_info(self, _: Request) -> Response:
        """What lm-eval asks for: special tokens and the chat template."""
        lm = self._session.lm
        if lm.tokenizer is None:
            raise ApiError(404, lm.no_tokenizer)
        tokenizer, eos = lm.tokenizer, lm.config.eos_ids
        bos = lm.config.bos_id
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "bos_token": None if bos is None else tokenizer.token(bos),
                "eos_token": tokenizer.token(eos[0]) if eos else None,
                "pad_token": None,
                "chat_template": tokenizer.chat_source,
                "model_max_length": self._session.max_context,
            }
        )


def _deliver_to(
    loop: asyncio.AbstractEventLoop, deliveries: asyncio.Queue, index: int
) -> Callable[[Any], None]:
    """Puts what a job delivers, in the engine's thread, where its request waits."""

    def deliver(what: Any) -> None:
        loop.call_soon_threadsafe(deliveries.put_nowait, (index, what))

    return deliver


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    words = {404: "no such path", 405: "no such method here"}
    message = f"{words.get(status, 'refused')}: {request.method} {request.url.path}"
    return _refusal(ApiError(status, message[:200]))


async def _on_failure(_: Request, error: Exception) -> Response:
    name = type(error).__name__
    return _refusal(ApiError(500, f"a fault of the server: {name}", "server_error"))
