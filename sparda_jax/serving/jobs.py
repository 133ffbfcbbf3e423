"""What a scheduler runs, and what it hands out."""

import dataclasses
from collections.abc import Callable

from sparda_jax.engine.generate_config import GenerateConfig
from sparda_jax.engine.results import StreamEvent, TokenLogprobs
from sparda_jax.engine.row_request import RowOutput


class Refused(Exception):
    """The server takes no such job now; the text says why."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last thing that a job delivers.

    Attributes:
      output: What it has given.
      reason: As in `RowOutput`, or "timeout", "aborted", "failed".
      prompt_logs: Of its prompt but for the first token, if it asked for them.
      cached: Tokens of its prompt that were not run again.
      message: What went wrong, if anything did.
    """

    output: RowOutput
    reason: str
    prompt_logs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    cached: int = 0
    message: str = ""


Delivery = list[StreamEvent] | Ended


@dataclasses.dataclass(eq=False)
class Job:
    """One output that a request asks for.

    Attributes:
      request_id: Of its request.
      prompt: Token ids.
      config: What is asked for.
      deliver: Takes what comes, in the engine's thread.
      logprobs, score_prompt: As `Session.join` takes them.
      deadline: `time.monotonic()` after which it is ended.
      times: When it arrived, was submitted, joined, had its first and its last
        token, and ended.
      row: Its row, while it has one.
      filling: Whether its prompt has not all run.
      cancelled: Nobody waits for it any more.
      dismissed: Somebody else than its client has ended it.
      ended: It is over.
      cached: Tokens of its prompt that were not run again.
      count: Tokens that it has given.
    """

    request_id: str
    prompt: list[int]
    config: GenerateConfig
    deliver: Callable[[Delivery], None]
    logprobs: bool = False
    score_prompt: bool = False
    deadline: float | None = None
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    row: int | None = None
    filling: bool = False
    cancelled: bool = False
    dismissed: bool = False
    ended: bool = False
    cached: int = 0
    count: int = 0
