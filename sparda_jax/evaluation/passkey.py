"""Passkey retrieval: a number hidden in a long real document, asked for at the end."""

import dataclasses
import random

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.config import ConfigError
from sparda_jax.evaluation.texts import python_manual

ANSWER_PREFIX = "The secret 5-digit passkey number of this document is"
# Small dense-pretrained models need the same words in needle, question and answer, and
# a word of warning before the document.
NEEDLE = (
    "\n\nThe secret 5-digit passkey number of this document is {answer}. Remember: the "
    "secret 5-digit passkey number of this document is {answer}. Do not forget: the "
    "secret 5-digit passkey number of this document is {answer}. {answer} is the "
    "passkey number.\n\n"
)
PREFACE = (
    "A secret 5-digit passkey number is hidden in the following document. Find it and "
    "remember it.\n\n\n"
)
QUESTION = "What is the secret 5-digit passkey number of this document?"


@dataclasses.dataclass(frozen=True)
class PasskeyTask:
    """One prompt and its answer.

    Attributes:
      ids: Token ids of the whole prompt.
      answer: The passkey, five digits.
      depth: Where it is hidden, 0 the document's start, 1 its end.
    """

    ids: tuple[int, ...]
    answer: str
    depth: float

    def solved_by(self, text: str) -> bool:
        """Whether an output names the passkey."""
        return self.answer in text


def question_messages(document: str, question: str) -> list[dict[str, str]]:
    """The chat turn that puts a question after a document."""
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def passkey_task(
    tokenizer: Tokenizer, *, tokens: int, depth: float, seed: int
) -> PasskeyTask:
    """Hides a passkey in Python's manual.

    Args:
      tokenizer: Of a model with a chat template.
      tokens: Length of the prompt, at most; it falls short by a few.
      depth: 0 … 1, where the passkey stands.
      seed: Chooses the passkey and which part of the manual is taken.

    Raises:
      ConfigError: If depth is out of range or tokens leave no room for a document.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth={depth!r} is not allowed: it must be from 0 to 1")
    rng = random.Random(seed)
    answer = str(rng.randrange(10000, 100000))
    needle = NEEDLE.format(answer=answer)

    def prompt(document: str) -> list[int]:
        messages = question_messages(PREFACE + document, QUESTION)
        return tokenizer.encode_chat(messages, answer_prefix=ANSWER_PREFIX)

    # The passkey between two halves costs a token or two more than the pieces do.
    room = tokens - len(prompt(needle)) - 8
    if room < 16:
        raise ConfigError(
            f"tokens={tokens} is not allowed: it must be at least {tokens - room + 16} "
            "to hold a document and the question"
        )
    manual = python_manual()
    start = rng.randrange(len(manual) // 2)
    # Eight characters a token are more than any English text needs.
    words = tokenizer.encode(manual[start : start + 8 * room])[:room]
    cut = round(depth * len(words))
    before, after = tokenizer.decode(words[:cut]), tokenizer.decode(words[cut:])
    ids = prompt(before + needle + after)
    return PasskeyTask(tuple(ids), answer, depth)
