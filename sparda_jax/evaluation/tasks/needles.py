"""Needles in a haystack with RULER's words: six kinds of needle, three of haystack.

Prompts, needles and numbers of keys and values are RULER's (NVIDIA, Apache-2.0,
arXiv 2404.06654, `scripts/synthetic.yaml`), for scores that can be set beside those of
others. Three of these tasks need nothing but words and are RULER's own; in the other
five RULER hides the needles in essays that must be downloaded, here they stand in the
Python manual: these are RULER-style.
"""

import functools
import random
import uuid

from sparda_jax.evaluation.samples import Draft, Task
from sparda_jax.evaluation.texts import passage, place_at_depths, sentences, word_list

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again."
)
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat are "
    "all the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# What RULER writes where there is a single answer.
_ONE_PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat is "
    "the special magic {kind} for {query} mentioned in the provided text?"
)
_ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
_DEPTHS = tuple(n / 39 for n in range(40))


def _word(rng: random.Random) -> str:
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return _word(rng)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _several(kind: str, rng: random.Random, count: int) -> list[str]:
    """Different values of a kind."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(kind, rng)] = None
    return list(found)


def _context(
    rng: random.Random, haystack: str, size: int, needles: list[str], distractors: str
) -> tuple[str, float]:
    """The text around the needles, and the depth of the first of these."""
    if haystack == "manual":
        depths = sorted(rng.sample(_DEPTHS, len(needles)))
        filling = passage(rng.randrange(len(sentences())), size)
        return " ".join(place_at_depths(filling, needles, depths)), depths[0]
    # Drawn after the needles and from a stream of their own: a longer text has the
    # same needles at other places.
    if haystack == "noise":
        lines = [NOISE] * size
    else:
        key_kind, value_kind = distractors.split()
        lines = [
            _NEEDLE.format(
                kind=value_kind, key=_draw(key_kind, rng), value=_draw(value_kind, rng)
            )
            for _ in range(size)
        ]
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    for inserted, (place, needle) in enumerate(zip(places, needles, strict=True)):
        lines.insert(place + inserted, needle)
    return "\n".join(lines), places[0] / max(len(lines) - 1, 1)


def _build(
    rng: random.Random,
    size: int,
    length: int,
    index: int,
    *,
    haystack: str,
    key_kind: str = "words",
    value_kind: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    del length, index
    names = _several(key_kind, rng, keys)
    numbers = _several(value_kind, rng, keys * values)
    owned = {
        name: numbers[n * values : (n + 1) * values] for n, name in enumerate(names)
    }
    asked = rng.sample(names, queries)
    needles = [
        _NEEDLE.format(kind=value_kind, key=name, value=value)
        for name, held in owned.items()
        for value in held
    ]
    rng.shuffle(needles)
    distractors = f"{key_kind} {value_kind}"
    context, depth = _context(rng, haystack, size, needles, distractors)
    one = queries * values == 1
    query = asked[0]
    if len(asked) > 1:
        query = ", ".join(asked[:-1]) + ", and " + asked[-1]
    kind = value_kind[:-1] if one else value_kind
    prompt, prefix = (_ONE_PROMPT, _ONE_PREFIX) if one else (_PROMPT, _PREFIX)
    return Draft(
        input=prompt.format(kind=kind, context=context, query=query),
        outputs=tuple(value for name in asked for value in owned[name]),
        answer_prefix=prefix.format(kind=kind, query=query),
        depth=depth if len(needles) == 1 else None,
    )


def _task(
    name: str, summary: str, *, family: str, least: int = 1, **settings: object
) -> Task:
    build = functools.partial(_build, **settings)  # pyrefly: ignore[bad-argument-type]
    words = settings.get("key_kind", "words") == "words"
    return Task(name, summary, family, 128, "all", build, least, words=words)


_OWN, _STYLE = "RULER", "RULER-style"
TASKS = (
    _task(
        "niah_single_1",
        "one word's number in repeated noise",
        family=_OWN,
        haystack="noise",
    ),
    _task(
        "niah_multikey_2",
        "one word's number among other words' numbers",
        family=_OWN,
        haystack="needles",
    ),
    _task(
        "niah_multikey_3",
        "one UUID's UUID among other UUIDs'",
        family=_OWN,
        haystack="needles",
        key_kind="uuids",
        value_kind="uuids",
    ),
    _task(
        "ruler_style_single_2",
        "one word's number in the Python manual",
        family=_STYLE,
        haystack="manual",
    ),
    _task(
        "ruler_style_single_3",
        "one word's UUID in the Python manual",
        family=_STYLE,
        haystack="manual",
        value_kind="uuids",
    ),
    _task(
        "ruler_style_multikey_1",
        "one word's number in the manual, with three other words' numbers",
        family=_STYLE,
        haystack="manual",
        keys=4,
    ),
    _task(
        "ruler_style_multivalue",
        "all four numbers of one word in the manual",
        family=_STYLE,
        haystack="manual",
        values=4,
    ),
    _task(
        "ruler_style_multiquery",
        "the numbers of four words in the manual",
        family=_STYLE,
        haystack="manual",
        keys=4,
        queries=4,
    ),
)
