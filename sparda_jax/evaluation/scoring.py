"""Scores of answers, all from 0 to 100."""

import difflib
import json
import re
import types
from collections.abc import Callable, Sequence

_CHOICES = (
    re.compile(r"[Tt]he correct answer is \(([A-D])\)"),
    re.compile(r"[Tt]he correct answer is ([A-D])\b"),
)
# Beside a number, the ways in which models write the end of a field.
_FIELD = r'"{key}"\s*:\s*("(?:[^"\\]|\\.)*"|[^,}}\n]+)'


def all_references(text: str, references: Sequence[str]) -> float:
    """Mean share of the references that stand in the text, letter case aside.

    The metric of RULER's retrieval and aggregation tasks.
    """
    folded = text.casefold()
    found = sum(reference.casefold() in folded for reference in references)
    return 100 * found / len(references)


def any_reference(text: str, references: Sequence[str]) -> float:
    """100 if one of the references stands in the text, letter case aside."""
    folded = text.casefold()
    return 100.0 * any(reference.casefold() in folded for reference in references)


def prefixed_ratio(text: str, references: Sequence[str]) -> float:
    """Likeness of a text that must begin with a given word; 0 without that word.

    The metric of MRCR. `references` are the prefix and the text that follows it.
    """
    prefix, wanted = references
    text = text.strip()
    if not text.startswith(prefix):
        return 0.0
    rest = text.removeprefix(prefix).strip()
    return 100 * difflib.SequenceMatcher(None, rest, wanted.strip()).ratio()


def _first_object(text: str) -> dict | None:
    """The first JSON object of a text."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _plain(value: object) -> str:
    return " ".join(str(value).split()).strip("\"' .").casefold()


def json_fields(text: str, references: Sequence[str]) -> float:
    """Share of the fields that an object in the text has right.

    `references` hold one JSON object, what is wanted. An object that is cut short or
    malformed is read field by field.
    """
    wanted = json.loads(references[0])
    given = _first_object(text)
    right = 0
    for key, value in wanted.items():
        found: object = None if given is None else given.get(key)
        if given is None:
            match = re.search(_FIELD.format(key=re.escape(key)), text)
            found = None if match is None else match.group(1)
        right += found is not None and _plain(found) == _plain(value)
    return 100 * right / len(wanted)


def four_way_choice(text: str, references: Sequence[str]) -> float:
    """100 if the text says "The correct answer is (X)" with the right letter.

    The metric of LongBench v2.
    """
    text = text.replace("*", "")
    for pattern in _CHOICES:
        match = pattern.search(text)
        if match is not None:
            return 100.0 * (match.group(1) == references[0])
    return 0.0


type Metric = Callable[[str, Sequence[str]], float]
METRICS: types.MappingProxyType[str, Metric] = types.MappingProxyType(
    {
        "all": all_references,
        "any": any_reference,
        "prefixed": prefixed_ratio,
        "fields": json_fields,
        "choice": four_way_choice,
    }
)
