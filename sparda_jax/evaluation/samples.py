"""Samples of tasks: what is asked, what is wanted, and their one way to token ids."""

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import ConfigError
from sparda_jax.config import ModelConfig

# A text is long enough with this share of the tokens that it may have.
_FULL, _TRIES = 0.97, 8

# The fewest tokens of a text whose perplexity is told by quarters.
LEAST_SCORED = 5

Kind = Literal["generate", "fork", "perplexity", "agreement"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One of several questions on one context.

    Attributes:
      input: What follows the context in the user's message.
      outputs: References.
    """

    input: str
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is asked and what is wanted. The first fields are those of RULER's rows.

    Attributes:
      index: Its number in the task.
      input: The user's last message; with `questions`, the context before them. Of
        texts to be scored, the text.
      outputs: References; what they mean is the metric's.
      length: Tokens of the whole prompt and room for the answer.
      answer_prefix: How the answer begins: it stands behind the chat template.
      token_position_answer: Tokens of `input` before the first reference; −1 if it
        does not stand there.
      depth: Where the answer stands in the text, 0 … 1; None where it has no place.
      history: Earlier messages of the chat, (role, content).
      questions: Questions that are all asked on this one context.
      metric: A name of `scoring.METRICS` other than the task's own; "" for that.
    """

    index: int
    input: str
    outputs: tuple[str, ...]
    length: int = 0
    answer_prefix: str = ""
    token_position_answer: int = -1
    depth: float | None = None
    history: tuple[tuple[str, str], ...] = ()
    questions: tuple[Question, ...] = ()
    metric: str = ""

    def row(self) -> dict[str, Any]:
        """As a JSON object; fields that a task does not use are left out."""
        values = dataclasses.asdict(self)
        for name in ("depth", "history", "questions", "metric"):
            if not values[name] and values[name] != 0.0:
                del values[name]
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A sample with the token ids of its prompts: one, or one a question.

    Attributes:
      sample: What is asked.
      ids: int32 arrays.
    """

    sample: Sample
    ids: list[np.ndarray]


def sample_of(row: dict[str, Any]) -> Sample:
    """The sample that `Sample.row` wrote."""
    values = dict(row)
    values["outputs"] = tuple(values["outputs"])
    values["history"] = tuple((r, c) for r, c in values.get("history", ()))
    values["questions"] = tuple(
        Question(q["input"], tuple(q["outputs"])) for q in values.get("questions", ())
    )
    return Sample(**values)


class Prompts:
    """The one way from samples to token ids, for every selector and every task.

    Args:
      tokenizer: The model's.
      config: The model, for its BOS.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._bos = [] if config.bos_id is None else [config.bos_id]
        self._chat = tokenizer.has_chat_template

    @property
    def form(self) -> str:
        """What a prompt is written as."""
        return "chat template" if self._chat else "plain text"

    def ids(self, sample: Sample, question: Question | None = None) -> list[int]:
        """Token ids of the whole prompt: messages, template, then the answer's prefix.

        Args:
          sample: What is asked.
          question: Which of its questions, if it has such.
        """
        content = sample.input + ("" if question is None else question.input)
        if self._chat:
            messages = [{"role": r, "content": c} for r, c in sample.history]
            messages.append({"role": "user", "content": content})
            return self._tokenizer.encode_chat(
                messages, answer_prefix=sample.answer_prefix
            )
        said = [f"{text}\n\n" for _, text in sample.history]
        return self.text_ids("".join([*said, content, sample.answer_prefix]))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain text that begins a sequence."""
        return [*self._bos, *self._tokenizer.encode(text)]

    def all_ids(self, sample: Sample) -> list[list[int]]:
        """Token ids of each of its prompts: one, or one a question."""
        if sample.questions:
            return [self.ids(sample, question) for question in sample.questions]
        return [self.ids(sample)]

    def about(self, sample: Sample) -> int:
        """Tokens of all that is said, quickly: without the chat template's own."""
        said = [text for _, text in sample.history]
        asked = sample.questions[0].input if sample.questions else ""
        whole = "\n".join([*said, sample.input + asked + sample.answer_prefix])
        return len(self._tokenizer.encode(whole))

    def longest(self, sample: Sample) -> int:
        """Tokens of the sample's longest prompt."""
        return max(map(len, self.all_ids(sample)))

    def position(self, sample: Sample) -> int:
        """Tokens of the input before the first reference; −1 if it is not there."""
        place = sample.input.find(sample.outputs[0]) if sample.outputs else -1
        if place < 0:
            return -1
        return len(self._tokenizer.encode(sample.input[:place]))


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample of a given size before its length is known.

    Attributes: as those of `Sample`.
    """

    input: str
    outputs: tuple[str, ...] = ()
    answer_prefix: str = ""
    depth: float | None = None
    history: tuple[tuple[str, str], ...] = ()
    questions: tuple[Question, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose samples are made here, for any length and tokenizer.

    Attributes:
      name: As users write it.
      summary: One line.
      family: Under which heading it is reported.
      max_new_tokens: Room for the answer.
      metric: A name of `scoring.METRICS`.
      build: `build(rng, size, length, index)` makes a draft with `size` units of
        filling (sentences, pairs, words, …): the same `rng` and a larger size give the
        same question in a longer text.
      least: The smallest size.
      most: The largest one; None where texts go on without end.
      kind: How it is run.
      words: It draws words from the package wonderwords, of the extra `eval`.
    """

    name: str
    summary: str
    family: str
    max_new_tokens: int
    metric: str
    build: Callable[[random.Random, int, int, int], Draft]
    least: int = 1
    most: int | None = None
    kind: Kind = "generate"
    words: bool = False

    def samples(
        self, prompts: Prompts, *, length: int, count: int, seed: int
    ) -> list[Sample]:
        """The first `count` samples of a length; each depends on its own index alone.

        Sizes start from the largest with which the first sample fits about; what is too
        long or much too short with it takes another one.

        Args:
          prompts: Of the model.
          length: Most tokens of prompt and answer together.
          count: How many.
          seed: Of all of them.

        Raises:
          ConfigError: If the length leaves no room.
        """
        size = self._largest(prompts, length, seed)
        return [self._fit(prompts, length, seed, i, size) for i in range(count)]

    def _draft(self, length: int, seed: int, index: int, size: int) -> Sample:
        rng = random.Random(f"{seed}/{self.name}/{length}/{index}")
        return Sample(index=index, **vars(self.build(rng, size, length, index)))

    def _fits(self, prompts: Prompts, length: int, seed: int, size: int) -> bool:
        """Whether the first sample fits with a size, about."""
        sample = self._draft(length, seed, 0, size)
        return prompts.about(sample) + self.max_new_tokens <= length

    def _largest(self, prompts: Prompts, length: int, seed: int) -> int:
        """The largest size with which the first sample fits about, by binary search."""
        end = None if self.most is None else self.most + 1
        low, high = self.least, 2 * self.least + 16
        while (end is None or high < end) and self._fits(prompts, length, seed, high):
            low, high = high, 2 * high
        high = high if end is None else min(high, end)
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(prompts, length, seed, middle):
                low = middle
            else:
                high = middle
        return low

    def _shrunk(
        self, prompts: Prompts, length: int, seed: int, index: int, size: int
    ) -> tuple[int, Sample]:
        """The first that fits on the way from a size down to the smallest."""
        while True:
            sample = self._draft(length, seed, index, size)
            needed = prompts.longest(sample) + self.max_new_tokens
            if needed <= length:
                return needed, sample
            if size == self.least:
                break
            size = max(self.least, min(size - 1, int(0.9 * size)))
        raise ConfigError(
            f"lengths={length} is not allowed: sample {index} of task {self.name!r} "
            f"needs {needed} tokens with this tokenizer"
        )

    def _fit(
        self, prompts: Prompts, length: int, seed: int, index: int, size: int
    ) -> Sample:
        best: tuple[int, Sample] | None = None
        # Sizes that fit and that do not: the best one is between them.
        fits, too_large = self.least - 1, math.inf
        for _ in range(_TRIES):
            sample = self._draft(length, seed, index, size)
            needed = prompts.longest(sample) + self.max_new_tokens
            if needed > length:
                too_large = min(too_large, size)
            else:
                fits = max(fits, size)
                if best is None or needed > best[0]:
                    best = needed, sample
                if needed >= _FULL * length:
                    break
            # Texts differ in the length of their units: the step goes by the ratio.
            aim = min(int(size * (1 + _FULL) / 2 * length / needed), too_large - 1)
            size = int(max(aim, fits + 1))
            if size >= too_large or (self.most is not None and size > self.most):
                break
        if best is None:
            best = self._shrunk(prompts, length, seed, index, size)
        needed, sample = best
        position = prompts.position(sample)
        return dataclasses.replace(
            sample, length=needed, token_position_answer=position
        )


def fingerprint(ids: Sequence[int]) -> str:
    """A short hash of token ids: results with the same one had the same prompt."""
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16]
