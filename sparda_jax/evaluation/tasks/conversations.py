"""MRCR-style: one of several answers to the same request in one chat.

The form is that of MRCR (requests and answers in one chat, some of the requests alike,
the i-th of which is asked for behind a random prefix); the texts are our own: passages
of the Python manual.
"""

import functools
import random
import string

from sparda_jax.evaluation.samples import Draft, Task
from sparda_jax.evaluation.texts import sentences

_THINGS = ("note", "summary", "memo", "report", "lesson", "digest", "letter", "leaflet")
_SUBJECTS = (
    "rivers",
    "lanterns",
    "glaciers",
    "harbours",
    "orchards",
    "clocks",
    "bridges",
    "meteors",
    "violins",
    "deserts",
    "kites",
    "lighthouses",
)
_ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
)
_CHARACTERS = 300


@functools.cache
def _passages() -> tuple[str, ...]:
    """Passages of the manual of at most 300 characters, all different."""
    found: dict[str, None] = {}
    parts: list[str] = []
    for sentence in sentences():
        text = " ".join([*parts, sentence])
        if len(text) <= _CHARACTERS:
            parts.append(sentence)
            continue
        if sum(map(len, parts)) > _CHARACTERS // 3:
            found[" ".join(parts)] = None
        parts = [sentence] if len(sentence) <= _CHARACTERS else []
    return tuple(found)


def _build(
    rng: random.Random, size: int, length: int, index: int, *, alike: int
) -> Draft:
    del length
    thing, subject = rng.choice(_THINGS), rng.choice(_SUBJECTS)
    prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=10))
    wanted = index % alike
    others = [(t, s) for t in _THINGS for s in _SUBJECTS if (t, s) != (thing, subject)]
    passages = rng.sample(_passages(), len(_passages()))
    depths = sorted(rng.random() for _ in range(alike))
    # Other requests come in any number, each of them as often as it comes.
    asked = [rng.choice(others) for _ in range(size)]
    for placed, depth in enumerate(depths):
        asked.insert(placed + round(depth * size), (thing, subject))
    history: list[tuple[str, str]] = []
    answers: list[str] = []
    for number, (what, about) in enumerate(asked):
        text = passages[number % len(passages)]
        history += [("user", f"Write a {what} about {about}."), ("assistant", text)]
        if (what, about) == (thing, subject):
            answers.append(text)
    return Draft(
        input=f"Write {prefix} and behind it, word for word, the {_ORDINALS[wanted]} "
        f"{thing} about {subject} that you wrote. Write nothing else.",
        outputs=(prefix, answers[wanted]),
        depth=depths[wanted],
        history=tuple(history),
    )


TASKS = tuple(
    Task(
        f"mrcr_style_{alike}",
        f"the i-th of {alike} answers to the same request of a chat",
        "MRCR-style",
        128,
        "prefixed",
        functools.partial(_build, alike=alike),
    )
    for alike in (2, 4, 8)
)
