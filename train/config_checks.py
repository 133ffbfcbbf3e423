"""Checks that fields of a training run's configuration share."""

import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

from sparda_jax.checks import Check, choice, flag, optional, require, settle
from sparda_jax.checks import text_path as check_path
from sparda_jax.evaluation.records import records_seed


@functools.cache
def _word_checks(kind: type) -> Mapping[str, Check[Any]]:
    """Checks of all fields whose type is a Literal, one or None, or bool."""
    checks: dict[str, Check[Any]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        kinds = typing.get_args(hint)
        for word in (hint, *kinds):
            if word is bool:
                checks[name] = flag
            elif typing.get_origin(word) is Literal:
                check = choice(*typing.get_args(word))
                checks[name] = optional(check) if type(None) in kinds else check
    return checks


def settle_fields(owner: Any, **checks: Check[Any]) -> None:
    """Puts all fields through their checks."""
    settle(owner, **_word_checks(type(owner)), **checks)


def check_export_best(config: Any) -> None:
    """Refuses `export_best` where nothing says which checkpoint is the best.

    Args:
      config: A `TrainConfig`.

    Raises:
      ConfigError: If no text is held out, or no best checkpoint is kept.
    """
    told = config.data.held_out > 0 and config.checkpoint.keep_best > 0
    require(
        told or not config.export_best,
        "TrainConfig.export_best",
        config.export_best,
        "False where DataConfig.held_out or CheckpointConfig.keep_best is 0",
    )


def check_source(field: str, value: object) -> str:
    """A source's name or path, as `evaluation.documents` takes them."""
    source = check_path(field, value)
    records_seed(source, field)
    return source
