"""Checks that fields of a training run's configuration share."""

import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

from sparda_jax.checks import Check, choice, flag, optional, settle


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
