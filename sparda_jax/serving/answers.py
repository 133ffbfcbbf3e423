"""What clients get: outputs as bodies and events in the form of OpenAI's API."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.engine.results import StreamEvent, TokenLogprobs
from sparda_jax.serving.jobs import Ended
from sparda_jax.serving.protocol import ApiRequest

_REASONS = {"stop": "stop", "length": "length"}


class Answer:
    """The answer to one request, put together from what its jobs deliver.

    Args:
      request: What was asked for.
      request_id: Its id, which the answer has as well.
      model: The model's name.
      tokenizer: Of the model; None gives no texts.
    """

    def __init__(
        self,
        request: ApiRequest,
        request_id: str,
        model: str,
        tokenizer: Tokenizer | None,
    ):
        self._request, self._id, self._model = request, request_id, model
        self._tokenizer = tokenizer
        self._created = int(time.time())
        outputs = len(request.prompts) * len(request.configs)
        self._counts = [0] * outputs
        self._cached = [0] * outputs
        # Where in the text of a choice its next token begins.
        self._offsets = [0] * outputs
        self._texts: list[list[str]] = [[] for _ in range(outputs)]
        self._logs: list[list[TokenLogprobs]] = [[] for _ in range(outputs)]
        self._ends: dict[int, Ended] = {}
        self._begun: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every job has ended."""
        return len(self._ends) == len(self._counts)

    def _prompt(self, index: int) -> list[int]:
        return self._request.prompts[index // len(self._request.configs)]

    def _token(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special=False)

    def _prompt_text(self, index: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(self._prompt(index))

    def usage(self) -> dict[str, Any]:
        """Tokens so far; each prompt counts once."""
        outputs = len(self._request.configs)
        prompts = sum(map(len, self._request.prompts))
        new = 0 if self._request.no_output else sum(self._counts)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached[::outputs])},
        }

    def take(self, index: int, events: Sequence[StreamEvent]) -> None:
        """Takes events of a job."""
        for event in events:
            self._counts[index] += event.token >= 0
            self._texts[index].append(event.text)
            if event.logs is not None:
                self._logs[index].append(event.logs)

    def end(self, index: int, ended: Ended) -> None:
        """Takes the last delivery of a job."""
        self._ends[index] = ended
        self._cached[index] = ended.cached

    def body(self) -> dict[str, Any]:
        """The whole answer; every job has ended."""
        kind = "chat.completion" if self._request.chat else "text_completion"
        choices = [self._choice(index) for index in range(len(self._counts))]
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _reason(self, index: int) -> str:
        return _REASONS.get(self._ends[index].reason, "error")

    def _choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        logs = self._logs[index]
        if self._request.chat:
            return {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._chat_logs(logs),
                "finish_reason": self._reason(index),
            }
        if self._request.no_output:
            text, logs = "", []
        if self._request.echo:
            text = self._prompt_text(index) + text
        return {
            "index": index,
            "text": text,
            "logprobs": self._text_logs(index, logs, whole=True),
            "finish_reason": self._reason(index),
        }

    def _top(self, log: TokenLogprobs) -> list[tuple[int, float]]:
        """As many of the likeliest as were asked for."""
        return list(log.top[: self._request.logprobs or 0])

    def _chat_logs(self, logs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._token(token)
            encoded = list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": encoded}

        content = [
            {
                **entry(log.token, log.logprob),
                "top_logprobs": [entry(*pair) for pair in self._top(log)],
            }
            for log in logs
        ]
        return {"content": content, "refusal": None}

    def _text_logs(
        self, index: int, logs: Sequence[TokenLogprobs], *, whole: bool
    ) -> dict[str, Any] | None:
        """Logs in the form of completions; with `whole` the prompt's in front."""
        if self._request.logprobs is None:
            return None
        entries: list[TokenLogprobs | None] = list(logs)
        tokens = [log.token for log in logs]
        if whole and self._request.echo:
            self._offsets[index] = 0
            prompt_logs = self._ends[index].prompt_logs
            entries = [None, *prompt_logs, *logs]
            tokens = [*self._prompt(index), *tokens]
        texts = [self._token(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [log and log.logprob for log in entries],
            "top_logprobs": [log and self._top_texts(log) for log in entries],
            "text_offset": offsets,
        }

    def _top_texts(self, log: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself, by their texts."""
        found: dict[str, float] = {}
        for token, logprob in [*self._top(log), (log.token, log.logprob)]:
            found.setdefault(self._token(token), logprob)
        return found

    def chunks(self, index: int, events: Sequence[StreamEvent]) -> Iterator[dict]:
        """Takes events of a job; gives the stream's events of their tokens."""
        for event in events:
            self._counts[index] += event.token >= 0
            yield from self._opening(index)
            logs = [] if event.logs is None else [event.logs]
            if (event.token >= 0 or event.text) and not self._request.no_output:
                yield self._chunk(index, event.text, logs, None)

    def last_chunk(self, index: int, ended: Ended) -> Iterator[dict]:
        """Takes the end of a job; gives the events that say so."""
        self.end(index, ended)
        yield from self._opening(index)
        yield self._chunk(index, "", [], self._reason(index))

    def usage_chunk(self) -> dict[str, Any]:
        """The event behind all others, of a stream that asked for it."""
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage()}

    def _opening(self, index: int) -> Iterator[dict]:
        """What comes before a choice's first token."""
        if index in self._begun:
            return
        self._begun.add(index)
        if self._request.chat:
            yield self._with_delta(index, {"role": "assistant", "content": ""})
        elif self._request.echo:
            yield self._chunk(index, self._prompt_text(index), [], None)

    def _chunk(
        self, index: int, text: str, logs: list[TokenLogprobs], reason: str | None
    ) -> dict[str, Any]:
        if self._request.chat:
            delta = {} if reason else {"content": text}
            found = self._chat_logs(logs) if logs else None
            return self._with_delta(index, delta, reason, found)
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._text_logs(index, logs, whole=False) if logs else None,
            "finish_reason": reason,
        }
        return self._event("text_completion", choice)

    def _with_delta(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logs,
            "finish_reason": reason,
        }
        return self._event("chat.completion.chunk", choice)

    def _event(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        event = {**self._head(kind), "choices": [choice]}
        if self._request.running_usage:
            event["usage"] = self.usage()
        elif self._request.usage:
            event["usage"] = None
        return event


class ApiError(Exception):
    """A refusal or a failure in the form of OpenAI's API.

    Args:
      status: Of HTTP.
      message: One line.
      kind: The error's type.
      code: A word for programs, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": None,
                "code": self.code,
            }
        }


def error_of_end(ended: Ended) -> ApiError | None:
    """What to say where a job has not ended by itself, or None."""
    if ended.reason in _REASONS:
        return None
    messages = {
        "timeout": (504, "the request's time is up (--request-timeout)", "timeout"),
        "aborted": (503, "the server is stopping", "aborted"),
        "cancelled": (499, "the request was cancelled", "cancelled"),
        "non_finite": (500, "the model's logits are not finite", "non_finite"),
    }
    default = (500, ended.message or "the engine has failed", "engine_failed")
    status, message, code = messages.get(ended.reason, default)
    return ApiError(status, message, "server_error", code)
