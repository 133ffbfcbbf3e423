"""Real texts and words that need no download: what tasks are made of."""

import functools
import importlib.resources
import importlib.util
import pathlib
import pydoc_data.topics
import re
import sysconfig
import textwrap
from collections.abc import Sequence

from sparda_jax.checks import ConfigError

_LONGEST = 240  # characters of a sentence
# Old modules with a stable, long source: code of many hands.
_CODE = (
    "argparse.py",
    "pathlib.py",
    "inspect.py",
    "tarfile.py",
    "typing.py",
    "subprocess.py",
    "zipfile.py",
    "socket.py",
    "shutil.py",
    "optparse.py",
    "doctest.py",
    "ftplib.py",
    "smtplib.py",
    "imaplib.py",
    "mailbox.py",
    "difflib.py",
    "statistics.py",
    "tempfile.py",
    "threading.py",
    "turtle.py",
)


def python_manual() -> str:
    """Real manual prose that every Python carries: the topics of its own help."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


@functools.cache
def python_code() -> str:
    """Real source code that every Python carries: modules of its standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [folder / name for name in _CODE if (folder / name).is_file()]
    files += sorted(folder.glob("zipfile/__init__.py")) + sorted(
        folder.glob("pathlib/*.py")
    )
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def sentences() -> tuple[str, ...]:
    """The manual's sentences in order, white space made single blanks.

    Grammars and tables have no sentences: they come in pieces of a few words.
    """
    text = " ".join(python_manual().split())
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
        found += textwrap.wrap(
            sentence, _LONGEST, break_long_words=False, break_on_hyphens=False
        )
    return tuple(found)


def passage(start: int, count: int) -> list[str]:
    """Sentences of the manual from number `start` on; it begins anew at its end.

    Args:
      start: Any integer of at least 0.
      count: How many.
    """
    every = sentences()
    return [every[(start + n) % len(every)] for n in range(count)]


def spread_depth(index: int) -> float:
    """A depth, 0 … 1, for a sample: multiples of the golden ratio fill them evenly."""
    return (0.5 + 0.6180339887498949 * index) % 1.0


def place_at_depths(
    parts: Sequence[str], inserted: Sequence[str], depths: Sequence[float]
) -> list[str]:
    """The parts with others put between them.

    Args:
      parts: A text in pieces.
      inserted: What to put between them, in the order of the depths.
      depths: Where, 0 the beginning and 1 the end, ascending.
    """
    result: list[str] = []
    taken = 0
    for text, depth in zip(inserted, depths, strict=True):
        place = round(depth * len(parts))
        result += [*parts[taken:place], text]
        taken = place
    return result + list(parts[taken:])


def words_available() -> bool:
    """Whether wonderwords is installed."""
    return importlib.util.find_spec("wonderwords") is not None


@functools.cache
def word_list(*kinds: str) -> tuple[str, ...]:
    """English words by kind: those that RULER draws from, of the package wonderwords.

    Args:
      *kinds: "noun", "adjective", "verb".

    Raises:
      ConfigError: If wonderwords is not installed.
    """
    try:
        folder = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        raise ConfigError(
            "this task draws its words, as RULER does, from the package wonderwords: "
            "pip install 'sparda-jax[eval]'"
        ) from None
    words: list[str] = []
    for kind in kinds:
        found = (folder / f"{kind}list.txt").read_text(encoding="utf-8")
        words += [line.strip() for line in found.splitlines() if line.strip()]
    return tuple(words)
