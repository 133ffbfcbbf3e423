"""Retrieval tasks of our own: passkey, key-value pairs, needles told in other words."""

import json
import random
import uuid

from sparda_jax.evaluation.passkey import (
    ANSWER_PREFIX,
    NEEDLE,
    PREFACE,
    QUESTION,
)
from sparda_jax.evaluation.samples import Draft, Question, Task
from sparda_jax.evaluation.texts import (
    passage,
    place_at_depths,
    sentences,
    spread_depth,
)

_FAMILY = "retrieval"


def _build_passkey(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del length
    answer = str(rng.randrange(10000, 100000))
    depth = spread_depth(index)
    filling = passage(rng.randrange(len(sentences())), size)
    needle = NEEDLE.format(answer=answer)
    text = " ".join(place_at_depths(filling, [needle], [depth]))
    return Draft(
        input=f"{PREFACE}{text}\n\n{QUESTION}",
        outputs=(answer,),
        answer_prefix=ANSWER_PREFIX,
        depth=depth,
    )


_QUESTIONS = 5


def _build_pairs(rng: random.Random, size: int, length: int, index: int) -> Draft:
    """Key-value pairs, asked for five times on one cache, as SCBench's Retr.KV."""
    del length, index
    names = [
        str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * size)
    ]
    pairs = dict(zip(names[::2], names[1::2], strict=True))
    asked = rng.sample(list(pairs), _QUESTIONS)
    listed = json.dumps(pairs, indent=0)
    questions = tuple(
        Question(
            f'\n\nWhich value has the key "{key}" in this object? Write the value '
            "alone.",
            (pairs[key],),
        )
        for key in asked
    )
    return Draft(
        input=f"The following JSON object holds values by key.\n\n{listed}",
        answer_prefix='The value is "',
        questions=questions,
    )


# What a person does, and a question for it in none of the same words.
LATENT = (
    ("{name} plays first violin in an orchestra.", "Which person is a musician?"),
    ("{name} drills teeth and fills cavities.", "Which person is a dentist?"),
    ("{name} kneads dough long before dawn.", "Which person is a baker?"),
    ("{name} lands jumbo jets on short runways.", "Which person is a pilot?"),
    ("{name} argues cases before judges daily.", "Which person is a lawyer?"),
    ("{name} milks forty cows every morning.", "Which person is a farmer?"),
    ("{name} photographs distant galaxies at night.", "Which person is an astronomer?"),
    ("{name} stitches silk gowns for weddings.", "Which person is a tailor?"),
    ("{name} hauls nets full of herring aboard.", "Which person is a fisherman?"),
    ("{name} grades algebra homework after school.", "Which person is a teacher?"),
    ("{name} welds leaking pipes under kitchen sinks.", "Which person is a plumber?"),
    ("{name} rushes into burning houses with hoses.", "Which person is a fireman?"),
)
_NAMES = (
    "Adaline",
    "Bertrand",
    "Cosima",
    "Dorian",
    "Eulalia",
    "Fabrice",
    "Gwendolyn",
    "Horatio",
    "Isolde",
    "Jeremias",
    "Katarzyna",
    "Leopold",
    "Mireille",
    "Norbert",
    "Ottoline",
    "Percival",
    "Rosalind",
    "Sebastian",
    "Theodora",
    "Wilhelmina",
)
_LATENT_NEEDLES = 4


def _build_latent(rng: random.Random, size: int, length: int, index: int) -> Draft:
    """One of four people, asked for by a trade that the text never names."""
    del length
    chosen = rng.sample(LATENT, _LATENT_NEEDLES)
    names = rng.sample(_NAMES, _LATENT_NEEDLES)
    depth = spread_depth(index)
    depths = [depth, *[rng.random() for _ in chosen[1:]]]
    told = sorted(
        (where, text.format(name=name))
        for where, (text, _), name in zip(depths, chosen, names, strict=True)
    )
    filling = passage(rng.randrange(len(sentences())), size)
    text = " ".join(
        place_at_depths(filling, [line for _, line in told], sorted(depths))
    )
    return Draft(
        input=f"Some people are mentioned in the following text.\n\n{text}\n\n"
        f"{chosen[0][1]} Answer with the name alone.",
        outputs=(names[0],),
        answer_prefix="The name is",
        depth=depth,
    )


TASKS = (
    Task(
        "passkey",
        "a five-digit number in the Python manual",
        _FAMILY,
        12,
        "all",
        _build_passkey,
    ),
    Task(
        "retr_kv",
        "five values of a JSON object of UUIDs, asked one by one on one cache",
        _FAMILY,
        40,
        "all",
        _build_pairs,
        _QUESTIONS,
        kind="fork",
    ),
    Task(
        "latent_needle",
        "a person by a trade that the text tells in other words",
        _FAMILY,
        12,
        "all",
        _build_latent,
    ),
)
