"""Tasks that score given tokens: perplexity by domain, agreement with dense."""

import random

from sparda_jax.evaluation.samples import Draft, Task
from sparda_jax.evaluation.texts import passage, python_code, python_manual, sentences

_MANUAL_START = 20_011  # primes: parts of a text that begin at many places
_CODE_START = 50_021


def _cut(text: str, start: int, size: int) -> str:
    """`size` characters from a place on; the text begins anew at its end."""
    start %= len(text)
    return (text + text)[start : start + size] if size <= len(text) else text * 2


def _build_manual(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del rng, length
    return Draft(input=_cut(python_manual(), index * _MANUAL_START, size))


def _build_code(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del rng, length
    return Draft(input=_cut(python_code(), index * _CODE_START, size))


def _build_agreement(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del length, index
    text = " ".join(passage(rng.randrange(len(sentences())), size))
    return Draft(
        input=f"{text}\n\nWrite a long and detailed summary of this text, point by "
        "point, with what each part of it says."
    )


TASKS = (
    Task(
        "perplexity_manual",
        "perplexity of Python's manual, by position",
        "perplexity",
        0,
        "",
        _build_manual,
        64,
        kind="perplexity",
    ),
    Task(
        "perplexity_code",
        "perplexity of Python's standard library, by position",
        "perplexity",
        0,
        "",
        _build_code,
        64,
        kind="perplexity",
    ),
    Task(
        "agreement",
        "next tokens of dense attention's own long answer: top-1 and KL",
        "agreement",
        256,
        "",
        _build_agreement,
        kind="agreement",
    ),
)
