"""Questions on documents: many fields of one text at once, and Python's own manual."""

import functools
import importlib
import inspect
import json
import random

from sparda_jax.evaluation.samples import Draft, Task
from sparda_jax.evaluation.texts import (
    passage,
    place_at_depths,
    sentences,
    spread_depth,
    word_list,
)

_FAMILY = "documents"

# Context-intensive extraction: every field stands at a place of its own, and another
# record has the same fields. The names of fields and how a text tells them.
_FIELDS = (
    ("founded", "was founded in {value}", "year"),
    ("director", "has been led by {value} for many years", "person"),
    ("rooms", "has {value} rooms", "number"),
    ("colour", "is painted {value}", "colour"),
    ("symbol", "shows a {value} on its flag", "noun"),
    ("motto", "has the word {value} as its motto", "adjective"),
    ("height_m", "stands {value} metres high", "number"),
    ("gate", "is entered by gate {value}", "number"),
    ("sponsor", "is paid for by {value}", "person"),
    ("exhibit", "is known for its old {value}", "noun"),
)
_PEOPLE = (
    "Adler",
    "Brandt",
    "Castell",
    "Dubois",
    "Egerton",
    "Falk",
    "Grimaldi",
    "Hollis",
    "Ivers",
    "Jansen",
    "Keller",
    "Lindqvist",
)
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
_PLACES = ("Arvell", "Bremont", "Cordane", "Delmora", "Esterby", "Fennick", "Galwyth")


def _value(kind: str, rng: random.Random) -> str | int:
    if kind == "year":
        return rng.randint(1700, 1999)
    if kind == "number":
        return rng.randint(11, 999)
    if kind == "person":
        return rng.choice(_PEOPLE)
    if kind == "colour":
        return rng.choice(_COLOURS)
    return rng.choice(word_list(kind))


def _build_extraction(rng: random.Random, size: int, length: int, index: int) -> Draft:
    del length, index
    asked, other = rng.sample(_PLACES, 2)
    records = {
        place: {name: _value(kind, rng) for name, _, kind in _FIELDS}
        for place in (asked, other)
    }
    told = [
        f"The house of {place} {form.format(value=record[name])}."
        for place, record in records.items()
        for name, form, _ in _FIELDS
    ]
    rng.shuffle(told)
    depths = sorted(rng.random() for _ in told)
    filling = passage(rng.randrange(len(sentences())), size)
    text = " ".join(place_at_depths(filling, told, depths))
    names = ", ".join(f'"{name}"' for name, _, _ in _FIELDS)
    return Draft(
        input=f"Facts about two houses stand in the following text.\n\n{text}\n\n"
        f"Write all that the text says of the house of {asked} as one JSON object "
        f"with the keys {names}. Write the object alone.",
        outputs=(json.dumps(records[asked]),),
        answer_prefix='{"founded":',
    )


# Modules whose functions have a name and a first line of their own.
_MODULES = (
    "os",
    "os.path",
    "shutil",
    "json",
    "re",
    "string",
    "textwrap",
    "statistics",
    "random",
    "itertools",
    "functools",
    "inspect",
    "ast",
    "tokenize",
    "traceback",
    "tempfile",
    "glob",
    "fnmatch",
    "heapq",
    "bisect",
    "copy",
    "pprint",
    "subprocess",
    "threading",
    "socket",
    "ssl",
    "email.utils",
    "urllib.parse",
    "html",
    "base64",
    "binascii",
    "zlib",
    "gzip",
    "tarfile",
    "zipfile",
    "csv",
    "locale",
    "gettext",
    "calendar",
    "datetime",
    "time",
    "math",
    "cmath",
    "operator",
    "types",
    "typing",
    "unittest.mock",
    "logging",
    "warnings",
    "contextlib",
    "asyncio",
    "multiprocessing",
    "mailbox",
    "imaplib",
    "ftplib",
    "smtplib",
    "uuid",
    "hashlib",
    "hmac",
    "secrets",
    "struct",
    "codecs",
    "unicodedata",
    "difflib",
    "doctest",
    "pdb",
    "dis",
    "pickle",
    "shelve",
    "platform",
    "sysconfig",
    "getpass",
    "curses.textpad",
    "decimal",
    "fractions",
    "numbers",
    "array",
    "weakref",
    "gc",
    "io",
    "select",
    "signal",
    "mmap",
)


def _first_line(documentation: str) -> str:
    return " ".join(documentation.split("\n\n")[0].split())


@functools.cache
def entries() -> tuple[tuple[str, str, str], ...]:
    """Documented functions of the standard library: name, first sentences, whole text.

    Names and first sentences are all different, and no name is part of the sentence.
    """
    found: dict[str, tuple[str, str, str]] = {}
    told: set[str] = set()
    for module_name in _MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not built on every system
            continue
        for name, function in sorted(vars(module).items()):
            text = inspect.getdoc(function) if inspect.isroutine(function) else None
            if not text or name.startswith("_") or len(name) < 5 or name in found:
                continue
            line = _first_line(text)
            if name.casefold() in line.casefold() or not 30 <= len(line) <= 300:
                continue
            if line in told:
                continue
            told.add(line)
            found[name] = (name, line, f"{module_name}.{name}\n{text}")
    return tuple(found.values())


def _build_pydoc(rng: random.Random, size: int, length: int, index: int) -> Draft:
    """A function by what its documentation says first."""
    del length
    every = entries()
    order = rng.sample(range(len(every)), len(every))
    depth = spread_depth(index)
    asked, chosen = order[0], order[1:size]
    place = round(depth * len(chosen))
    chosen.insert(place, asked)
    document = "\n\n".join(every[n][2] for n in chosen)
    name, line, _ = every[asked]
    return Draft(
        input=f"The following is documentation of Python's functions.\n\n{document}\n\n"
        f"Which function is documented with these words: “{line}”? Write its name.",
        outputs=(name,),
        answer_prefix="The function is",
        depth=place / max(len(chosen) - 1, 1),
    )


TASKS = (
    Task(
        "extract_json",
        "ten fields of one of two records, as one JSON object",
        _FAMILY,
        160,
        "fields",
        _build_extraction,
        words=True,
    ),
    Task(
        "pydoc",
        "a function of Python's library by its documentation",
        _FAMILY,
        16,
        "all",
        _build_pydoc,
        2,
        600,
    ),
)
