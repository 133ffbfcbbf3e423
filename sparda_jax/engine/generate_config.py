"""`GenerateConfig`: what a request asks of generation, beside its prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sparda_jax.checks import (
    Check,
    flag,
    instance,
    integer,
    optional,
    require,
    several,
    text,
)
from sparda_jax.inference.sampling import (
    SAMPLING_CHECKS,
    SamplingConfig,
    check_seed,
)

# Outputs of one prompt.
_MOST_OUTPUTS = 2**16


def _stop_texts(field: str, value: object) -> tuple[str, ...]:
    """Checks one text or several; each is kept once."""
    texts: object = [value] if isinstance(value, str) else value
    stops = several(text, "texts", ordered=False)(field, texts)
    require("" not in stops, field, value, "texts of at least one character")
    return tuple(dict.fromkeys(stops))


_CHECKS: Mapping[str, Check[Any]] = {
    "max_new_tokens": integer(1),
    "min_new_tokens": integer(0),
    **SAMPLING_CHECKS,
    "seed": check_seed,
    "n": integer(1, _MOST_OUTPUTS),
    "stop": _stop_texts,
    "stop_ids": several(integer(0), "token ids", ordered=False),
    "include_stop": flag,
    "ignore_eos": flag,
    "max_context": optional(integer(1)),
    "prefill_chunk": optional(integer(1)),
}


class GenerateOptions(TypedDict, total=False):
    """The fields of `GenerateConfig` as keyword arguments."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]
    n: int
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    max_context: int | None
    prefill_chunk: int | None


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What a request asks for; `generate`, `stream` and `chat` take one.

    Their keyword arguments have the same names, and go before its fields.

    Attributes:
      max_new_tokens: Most output tokens of each sequence.
      min_new_tokens: Tokens before which a sequence does not end: EOS and stop ids are
        not drawn, and stop strings are looked for behind them only.
      temperature: 0 is greedy.
      top_k: Keep the k best tokens; 0 is off.
      top_p: Keep the smallest set of best tokens whose probability reaches p; 1 is off.
      min_p: Keep tokens with at least min_p times the best one's probability; 0 is off.
      repetition_penalty: Logits of tokens seen in the prompt or the output are divided
        (positive ones) or multiplied (negative ones) by it; 1 is off.
      seed: One seed for all, or one each. A sequence's tokens depend on its own prompt
        and seed alone, so equal prompts with one seed give equal outputs.
      n: Outputs of each prompt, one after the other: output i of a prompt is that of
        `seed` + i. Every one is prefilled; to prefill a long prompt once, see
        `Conversation.fork`.
      stop: Texts that end a sequence, wherever in a token they begin or end. The text
        of an output ends before the first of them; its tokens, and so the conversation,
        end with the one that completed it. The name of a special token ends a sequence
        at that token.
      stop_ids: Token ids that end a sequence, beside the model's EOS.
      include_stop: Let the text of an output end behind its stop string.
      ignore_eos: Let EOS pass.
      max_context: Length to choose LongRoPE's factors for, if further turns shall grow
        past this call's.
      prefill_chunk: Cut a long prompt into calls of that many tokens: device memory
        then holds the hidden states of one piece.

    Raises:
      ConfigError: If a value is not allowed for any model. What depends on the model
        (its context, its tokenizer, its vocabulary) is checked by the call.

    Example:
      >>> config = sj.GenerateConfig(max_new_tokens=2, ignore_eos=True)
      >>> len(sj.generate(lm, ["ab"], config).tokens[0])
      2
      >>> len(sj.generate(lm, ["ab"], config, max_new_tokens=3).tokens[0])
      3
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    max_context: int | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        # Named as the arguments of `generate` are, which is where most are written.
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        require(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"at most max_new_tokens={self.max_new_tokens}",
        )

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig(**{name: getattr(self, name) for name in SAMPLING_CHECKS})


def merge_options(
    config: GenerateConfig | None, options: Mapping[str, Any]
) -> GenerateConfig:
    """The configuration (None is the default one) with keyword arguments put in.

    Raises:
      ConfigError: If it is no `GenerateConfig`, or a value is not allowed.
      TypeError: If there is no option of a name.
    """
    base = optional(instance(GenerateConfig))("config", config)
    return dataclasses.replace(base or GenerateConfig(), **options)
