"""Typed access to the settings of a model file, whatever it is written in."""

from collections.abc import Callable, Mapping
from typing import Any

MAX_INTEGER = 2**31 - 1  # Sizes and positions are int32 on the device.

Fail = Callable[[str, object, str], Exception]


def _positive(value: object) -> float | None:
    """A finite number above 0 as a float, None for anything else.

    Integers of JSON have no bound; one that is no float is no setting either.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value <= 1e30 else None


class Fields:
    """The settings of a file, or of an object in it.

    A setting whose value is null is read as one that is not there.

    Args:
      values: Values by key.
      fail: Makes the error of a value: from its key, the value and what is allowed.
    """

    def __init__(self, values: Mapping[str, Any], fail: Fail) -> None:
        self.values = values
        self.fail = fail

    def get(self, key: str) -> Any:
        """The value as it stands, None if there is none."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; without a default it must be there."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= MAX_INTEGER:
            raise self.fail(key, value, f"an integer from {least} to {MAX_INTEGER}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default it must be there."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        number = _positive(value)
        if number is None:
            raise self.fail(key, value, "a finite number above 0")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        values = self.values.get(key)
        if not isinstance(values, list):
            raise self.fail(key, values, "a list of numbers")
        numbers = []
        for value in values:
            number = _positive(value)
            if number is None:
                raise self.fail(key, value, "a list of finite numbers above 0")
            numbers.append(number)
        return tuple(numbers)

    def inner(self, key: str) -> "Fields | None":
        """The object under a key, None if there is none."""
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, dict):
            raise self.fail(key, values, "a JSON object")

        def fail(name: str, value: object, allowed: str) -> Exception:
            return self.fail(f"{key}.{name}", value, allowed)

        return Fields(values, fail)
