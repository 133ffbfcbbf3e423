"""What a server is told when it starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from sparda_jax.checks import (
    LARGEST_BYTES,
    Check,
    choice,
    integer,
    non_empty_text,
    number,
    optional,
    settle,
)

OnTerm = Literal["finish", "abort"]

SETTING_CHECKS: Mapping[str, Check[Any]] = {
    "model_name": non_empty_text,
    "max_batch": integer(1, 2**12),
    "max_context": optional(integer(2)),
    "max_new_tokens": integer(1),
    "prefill_chunk": integer(1),
    "decode_steps": integer(1, 1024),
    "max_waiting": integer(0, 2**20),
    "top_logprobs": integer(0, 100),
    "prefix_bytes": integer(0, LARGEST_BYTES),
    "request_timeout": optional(number(above=0, most=1e7)),
    "client_timeout": number(above=0, most=1e5),
    "max_body_bytes": integer(1024, LARGEST_BYTES),
    "max_connections": integer(1, 2**20),
    "api_key": optional(non_empty_text),
    "on_term": choice("finish", "abort"),
}


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """What a server is told when it starts.

    Attributes:
      model_name: How clients call the model.
      max_batch: Requests that run at a time; each output takes a row.
      max_context: Tokens of a request, prompt and output; None is the model's context.
      max_new_tokens: Most output tokens of a request.
      prefill_chunk: Tokens of a prompt that run between two decode steps of the others:
        the pause that a long prompt makes for them.
      decode_steps: Most tokens of a call, as far as a fifth of a second holds them; a
        request that is cancelled frees its row within that time. With 1: within one
        step.
      max_waiting: Outputs that may wait for a row; more are refused (503).
      top_logprobs: Most likeliest tokens that a request can ask for.
      prefix_bytes: Host memory for beginnings of prompts that others share; 0 is none.
      request_timeout: Seconds after which a request is ended; None is never.
      client_timeout: Seconds that a client may take to send its headers or body, or to
        take what waits for it.
      max_body_bytes: Of a request.
      max_connections: Open sockets; more are closed at once.
      api_key: What clients must bring as a bearer token; None lets all in.
      on_term: At SIGTERM: `finish` what was accepted, or `abort` it.

    Raises:
      ConfigError: If a value is not allowed.
    """

    model_name: str
    max_batch: int = 8
    max_context: int | None = None
    max_new_tokens: int = 4096
    prefill_chunk: int = 512
    decode_steps: int = 32
    max_waiting: int = 1024
    top_logprobs: int = 20
    prefix_bytes: int = 2**30
    request_timeout: float | None = None
    client_timeout: float = 30.0
    max_body_bytes: int = 32 * 2**20
    max_connections: int = 4096
    api_key: str | None = dataclasses.field(default=None, repr=False)
    on_term: OnTerm = "finish"

    def __post_init__(self) -> None:
        settle(self, **SETTING_CHECKS)
