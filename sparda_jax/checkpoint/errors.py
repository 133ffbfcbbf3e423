"""The errors of this package."""

import reprlib

from sparda_jax.checks import OneLineError


class CheckpointError(OneLineError):
    """A model file holds something that is damaged, wrong or not supported.

    The message is one line: file, field, value found, values allowed.
    """


class UnsupportedTokenizer(CheckpointError):
    """A model's tokenizer is not supported; the model can be used with token ids."""


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__(maxstring=80, maxother=80, maxlong=40, maxlevel=3)


def readable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def show(value: object) -> str:
    """Returns `repr(value)`, shortened: values of a damaged file may be megabytes."""
    try:
        return _ShortRepr().repr(value)
    except Exception:  # an integer of thousands of digits; anyone's own __repr__
        return f"a value of type {type(value).__name__}"
