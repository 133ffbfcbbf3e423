"""RULER's tracing and aggregation tasks: vt, cwe, fwe.

Prompts and numbers are RULER's (NVIDIA, Apache-2.0, arXiv 2404.06654); words come from
the package that RULER takes.
"""

import math
import random
import string

from sparda_jax.evaluation.samples import Draft, Task
from sparda_jax.evaluation.tasks.needles import NOISE
from sparda_jax.evaluation.texts import word_list

# The spelling is RULER's.
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {value}, they are: "
)
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\nQuestion: Find all variables that are assigned the value "
    "{value} in the text above."
)
_HOPS = 4
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n{context}\nQuestion: What are "
    "the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find "
    "the three most frequently appeared coded words. {context}\nQuestion: Do not "
    "provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
_FWE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared "
    "words are:"
)
_SHORT = 4096  # Below it RULER's cwe has fewer repetitions.


def _names(rng: random.Random, letters: int, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)


def _chain(rng: random.Random, size: int, letters: int) -> tuple[str, str, list[str]]:
    """A text with one chain of assignments, its value and its variables."""
    names = _names(rng, letters, _HOPS + 1)
    value = str(rng.randrange(10000, 99999))
    links = [f"VAR {names[0]} = {value}"]
    pairs = zip(names[1:], names[:-1], strict=True)
    links += [f"VAR {name} = VAR {before} " for name, before in pairs]
    lines = [NOISE + "\n"] * size
    places = sorted(rng.sample(range(size), len(links)))
    for inserted, (place, link) in enumerate(zip(places, links, strict=True)):
        lines.insert(place + inserted, link)
    return " ".join(lines).replace(". \n", ".\n"), value, names


def _build_vt(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del length, index
    parts = []
    # A worked example of 500 tokens with names of three letters, then the question.
    for lines, letters in ((15, 3), (size, 5)):
        context, value, names = _chain(rng, lines, letters)
        parts.append(
            (
                _VT.format(context=context, value=value),
                _VT_PREFIX.format(count=_HOPS + 1, value=value),
                names,
            )
        )
    (example, its_prefix, its_names), (question, prefix, names) = parts
    shown = f"{example}{its_prefix}{' '.join(its_names)}\n\n\n\n"
    return Draft(input=shown + question, outputs=tuple(names), answer_prefix=prefix)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))


def _list_of_words(
    rng: random.Random, pool: list[str], common: int, others: int
) -> tuple[str, list[str]]:
    """A numbered list with the pool's first ten words `common` times each."""
    words = pool[:_COMMON] * common + pool[_COMMON:] * others
    rng.shuffle(words)
    return _numbered(words), pool[:_COMMON]


def _cwe_words() -> list[str]:
    return sorted(set(word_list("noun", "adjective", "verb")))


def _build_cwe(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del index
    words = _cwe_words()
    short = length < _SHORT
    example = rng.sample(words, 20 if short else 40)
    # Drawn as one order of all words: a longer list has the same common ones.
    pool = rng.sample(words, len(words))[:size]
    listed, answer = _list_of_words(rng, example, *((3, 1) if short else (10, 3)))
    shown = f"{_CWE.format(context=listed)}{_CWE_PREFIX} {_numbered(answer)}\n"
    listed, answer = _list_of_words(rng, pool, *((6, 1) if short else (30, 3)))
    return Draft(
        input=shown + _CWE.format(context=listed),
        outputs=tuple(answer),
        answer_prefix=_CWE_PREFIX,
    )


def _build_fwe(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del index
    words: dict[str, None] = {}
    while len(words) < max(length // 50, 4):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    # Ranks 1–3 are asked for; the most frequent of all is noise, written as dots.
    ranked = ["...", *list(words)[1:]]
    zeta2 = math.pi**2 / 6
    text = [
        word
        for rank, word in enumerate(ranked, 1)
        for _ in range(int(size * rank**-2.0 / zeta2))
    ]
    rng.shuffle(text)
    return Draft(
        input=_FWE.format(context=" ".join(text)),
        outputs=tuple(ranked[1:4]),
        answer_prefix=_FWE_PREFIX,
    )


TASKS = (
    Task(
        "vt",
        "all five variables that a chain of assignments gives one value",
        "RULER",
        30,
        "all",
        _build_vt,
        _HOPS + 2,
    ),
    Task(
        "cwe",
        "the ten most common words of a list",
        "RULER",
        120,
        "all",
        _build_cwe,
        _COMMON + 1,
        # All the words that there are; RULER goes on with a list of its own beyond.
        8000,
        words=True,
    ),
    Task(
        "fwe",
        "the three most frequent coded words",
        "RULER",
        50,
        "all",
        _build_fwe,
        # Ranks 1 to 4 differ from here on.
        60,
    ),
)
