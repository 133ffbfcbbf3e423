"""What calls return: outputs, their measured figures, conversations, stream events."""

import dataclasses

from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.offload_stats import OffloadStats


@dataclasses.dataclass(frozen=True)
class GenerateStats:
    """Measured figures of one call.

    Attributes:
      prompt_tokens, new_tokens: Summed over the batch.
      prefill_seconds: Prompt and first token; None if not timed apart.
      decode_seconds: All further tokens; None if not timed apart.
      total_seconds: Both, without compilation.
      compile_seconds: Time spent compiling for this call; 0 when it was compiled.
      prefill_blocks, decode_blocks: KV blocks (attended, present), summed over tokens,
        kv heads and layers.
      offload: What decode fetched from host memory; None for a resident cache.
      policy: What `auto` settings of the cache decided, and why; empty without them.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill_seconds: float | None
    decode_seconds: float | None
    total_seconds: float
    compile_seconds: float
    prefill_blocks: tuple[int, int]
    decode_blocks: tuple[int, int]
    offload: OffloadStats | None = None
    policy: str = ""

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens over prefill time."""
        if not self.prefill_seconds:
            return None
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after each row's first, over decode time; None if there are none."""
        later = self.new_tokens - self.batch
        if not self.decode_seconds or later <= 0:
            return None
        return later / self.decode_seconds

    @property
    def decode_block_share(self) -> float | None:
        """KV blocks that decode read, of those present."""
        attended, present = self.decode_blocks
        return attended / present if present else None


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
      tokens: Output token ids of each sequence, with the one that ended it.
      texts: Decoded outputs without special tokens, each up to the stop string that
        ended it; empty without a tokenizer.
      finish_reasons: Per sequence "stop" (EOS, a stop id or string), "length",
        "non_finite": its logits were NaN or infinite, so that no further token follows
        (damaged weights, or a type too narrow for them), or "cancelled": its stream was
        ended by `Stream.cancel`.
      stats: Measured figures.
      conversation: To continue with `generate(..., conversation=...)`.
    """

    tokens: list[list[int]]
    texts: list[str]
    finish_reasons: list[str]
    stats: GenerateStats
    conversation: Conversation

    def __repr__(self) -> str:
        counts = ", ".join(str(len(row)) for row in self.tokens[:8])
        more = ", …" if len(self.tokens) > 8 else ""
        first = f", texts[0]={shorten(self.texts[0])}" if self.texts else ""
        return (
            f"GenerateOutput({len(self.tokens)} rows of {counts}{more} new tokens, "
            f"finish_reasons={sorted(set(self.finish_reasons))}{first}, "
            f"{self.stats.total_seconds:.3g} s, {self.conversation!r})"
        )


def shorten(text: str, most: int = 60) -> str:
    """A text as a short literal."""
    return repr(text if len(text) <= most else f"{text[: most - 1]}…")


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """What the model said of one token, before temperature, penalties and filters.

    Attributes:
      token: Its id.
      logprob: Its log-probability.
      top: The likeliest tokens in its place with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One token of one sequence as it comes.

    Attributes:
      index: The sequence.
      token: Its id; −1 in a last event that only brings text.
      text: What it completes. Text that may be the beginning of a stop string comes
        with a later event, or not at all; the texts of a sequence's events join to its
        output's.
      logs: Log-probabilities, where a session's request asked for them.
    """

    index: int
    token: int
    text: str
    logs: TokenLogprobs | None = None
