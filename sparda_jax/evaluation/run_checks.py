"""Checks of what the files of an evaluation say: once, when they are read.

Files may be cut off, edited or come from another version. What passes here has the
types that tables, plots and pages rely on, and finite numbers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import (
    Check,
    ConfigError,
    flag,
    integer,
    number,
    optional,
    require,
    several,
    shown,
    text,
)
from sparda_jax.inference.sampling import MOST_SEED

FORMAT = 1
QUARTERS = 4  # Parts of a text whose perplexities are told apart.
_FLOAT32 = float(np.finfo(np.float32).max)
_PERCENT = number(least=0, most=100)
_TEXTS = several(text, "texts")


def _format(field: str, value: object) -> int:
    require(value is not True and value == FORMAT, field, value, f"{FORMAT}")
    return FORMAT


def _object(field: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{field}={shown(value)} is not allowed: it must be an object"
        )
    return value


def _names(field: str, value: object) -> Mapping[str, str]:
    """Checks an object whose values are texts."""
    return {k: text(f"{field}[{k!r}]", v) for k, v in _object(field, value).items()}


def _one_or_more(field: str, value: object) -> object:
    """Checks a text, or texts, or texts of each of several questions."""
    if isinstance(value, list):
        return [_one_or_more(f"{field}[{n}]", entry) for n, entry in enumerate(value)]
    return text(field, value)


def _quarters(field: str, value: object) -> tuple[float, ...]:
    found = several(number(least=0, most=_FLOAT32), "numbers")(field, value)
    require(len(found) == QUARTERS, field, value, f"{QUARTERS} numbers")
    return found


# The fields without which there are no tables, then those that need not be there.
_SETTINGS: dict[str, Check[Any]] = {
    "format": _format,
    "model": text,
    "attention": _TEXTS,
    "labels": _names,
    "tasks": _TEXTS,
    "floor": _PERCENT,
    "seed": integer(0, MOST_SEED),
    "samples": integer(1),
}
_MORE_SETTINGS: dict[str, Check[Any]] = {
    "weights": optional(text),
    "forecast": text,
    "forecast_trained": flag,
    "tokenizer": text,
    "prompts": text,
    "dtype": text,
    "storage": text,
    "cache": text,
    "geometry": _object,
    "lengths": several(integer(1), "lengths"),
    "task_files": _names,
    "devices": _TEXTS,
    "commits": _TEXTS,
    "jax": text,
    "python": text,
    "started": text,
}
_RECORD: dict[str, Check[Any]] = {
    "task": text,
    "length": integer(1),
    "attention": text,
    "budget": integer(0),
    "index": integer(0),
}
_MORE_RECORD: dict[str, Check[Any]] = {
    "prompt_tokens": integer(0),
    "prompt": text,
    "depth": number(least=0, most=1),
    "score": _PERCENT,
    "output": _one_or_more,
    "outputs": _one_or_more,
    "tokens": number(least=0),
    "finish": _one_or_more,
    "read": optional(number(least=0)),
    "failed": text,
    "surprise": number(least=0, most=_FLOAT32),
    "by_position": _quarters,
    "likeliest": _PERCENT,
    "kl": optional(number(least=-_FLOAT32, most=_FLOAT32)),
}
_OUTCOMES = ("score", "surprise", "failed")
_SAMPLE: dict[str, Check[Any]] = {
    "index": integer(0),
    "input": text,
    "outputs": _TEXTS,
}
_MORE_SAMPLE: dict[str, Check[Any]] = {
    "length": integer(0),
    "answer_prefix": text,
    "token_position_answer": integer(-1),
    "depth": number(least=0, most=1),
    "history": several(_TEXTS, "messages"),
    "questions": several(_object, "questions"),
    "metric": text,
}


def _check(
    values: Mapping[str, Any],
    where: str,
    needed: Mapping[str, Check[Any]],
    others: Mapping[str, Check[Any]],
) -> None:
    for name in needed:
        if name not in values:
            raise CheckpointError(f"{where}: has no {name!r}")
    checks = {**needed, **others}
    for name, value in values.items():
        try:
            if name in checks:
                checks[name](name, value)
            json.dumps(value, allow_nan=False)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{where}: {shown(name)}={shown(value)} is not allowed: it must be "
                "made of finite numbers, not too deeply nested"
            ) from error


def check_settings(values: Mapping[str, Any], where: str) -> None:
    """Refuses settings of a run that are damaged or of another version.

    Args:
      values: What `run.json` says.
      where: The file, for messages.

    Raises:
      CheckpointError: Names the file and the field.
    """
    _check(values, where, _SETTINGS, _MORE_SETTINGS)


def check_records(records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuses records of a cell that are damaged, or are not all of one cell.

    Args:
      records: Where each stands, and the record.

    Raises:
      CheckpointError: Names the line and the field.
    """
    for where, record in records:
        _check(record, where, _RECORD, _MORE_RECORD)
        if not any(name in record for name in _OUTCOMES):
            raise CheckpointError(f"{where}: has none of {', '.join(_OUTCOMES)}")
        for name in ("task", "length", "attention", "budget"):
            first = records[0][1][name]
            if record[name] != first:
                raise CheckpointError(
                    f"{where}: {name}={shown(record[name])} is not allowed: it must be "
                    f"{shown(first)}, as in the first line"
                )


def check_sample(row: Mapping[str, Any], where: str) -> None:
    """Refuses the row of a sample that is damaged.

    Args:
      row: As `Sample.row` writes it.
      where: File and line, for messages.

    Raises:
      CheckpointError: Names the line and the field.
    """
    _check(row, where, _SAMPLE, _MORE_SAMPLE)
    unknown = row.keys() - _SAMPLE.keys() - _MORE_SAMPLE.keys()
    if unknown:
        raise CheckpointError(f"{where}: has an unknown field {shown(min(unknown))}")
    if any(len(message) != 2 for message in row.get("history", ())):
        raise CheckpointError(f"{where}: history must be pairs of role and content")
    for n, question in enumerate(row.get("questions", ())):
        place = f"{where}: questions[{n}]"
        _check(question, place, {"input": text, "outputs": _TEXTS}, {})
