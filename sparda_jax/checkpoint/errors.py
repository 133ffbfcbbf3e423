"""The errors of this package."""

import reprlib


class CheckpointError(ValueError):
    """A model file holds something that is damaged, wrong or not supported.

    The message is one line: file, field, value found, values allowed.
    """


class UnsupportedTokenizer(CheckpointError):
    """A model's tokenizer is not supported; the model can be used with token ids."""


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__(maxstring=80, maxother=80, maxlong=40, maxlevel=3)


def show(value: object) -> str:
    """Returns `repr(value)`, shortened: values of a damaged file may be megabytes."""
    return _ShortRepr().repr(value)
