"""What calls return: outputs, their measured figures, conversations, stream events."""

import dataclasses
import threading

from sparda_jax.config import ConfigError
from sparda_jax.engine.offload_stats import OffloadStats
from sparda_jax.inference.generate import GenerateState


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


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A cache to which further turns can be appended; used up by the next turn.

    Attributes:
      state: Device state after the last turn.
      lengths: Tokens in the cache, per row.
      rope_length: Longest context that the rotary frequencies were chosen for.
    """

    state: GenerateState
    lengths: tuple[int, ...]
    rope_length: int
    # Held by the one turn that goes on from here: one thread can take it, once.
    _taken: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, repr=False, compare=False
    )

    def check_unused(self) -> None:
        """Raises ConfigError if another turn has gone on from here."""
        if self._taken.locked():
            raise ConfigError(
                "conversation is used up, by a further turn or a stream that was made "
                "with it: continue with the one in that turn's output"
            )

    def take(self) -> GenerateState:
        """The state, for the one turn that goes on from here.

        The turn writes over the buffers, so no other may use them.

        Raises:
          ConfigError: If another turn has taken it.
        """
        if not self._taken.acquire(blocking=False):
            self.check_unused()
        return self.state


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
      tokens: Output token ids of each sequence, with the one that ended it.
      texts: Decoded outputs without special tokens; empty without a tokenizer.
      finish_reasons: "stop" (EOS or a stop id) or "length", per sequence.
      stats: Measured figures.
      conversation: To continue with `generate(..., conversation=...)`.
    """

    tokens: list[list[int]]
    texts: list[str]
    finish_reasons: list[str]
    stats: GenerateStats
    conversation: Conversation


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One token of one sequence as it comes; `text` is what it completes."""

    index: int
    token: int
    text: str
