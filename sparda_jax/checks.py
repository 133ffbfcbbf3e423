"""One boundary for values that come from outside: checked once, then in one form.

A check takes the name of a field and the value that was given for it. It returns the
value in the form that the rest of the code relies on (an `int` for any integer, a
`tuple` for any sequence) or raises a `ConfigError` of one line that names field, value
and what is allowed. Checks are made by the functions below and put together:
`optional(integer(least=1))` takes None as well.
"""

import dataclasses
import math
import operator
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type Check[T] = Callable[[str, object], T]

# No count of this project passes a 32-bit index; bytes have a limit of their own.
LARGEST = 2**31 - 1
LARGEST_BYTES = 2**62
_MOST_ENTRIES = 2**24
# Looks at the first entries of a container only: it may hold millions.
_SHORT = reprlib.Repr(maxlevel=3, maxstring=100, maxother=100, maxlong=60)
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


class OneLineError(ValueError):
    """An error of one line, whatever the names in it hold."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class ConfigError(OneLineError):
    """A configuration field holds a value that is not allowed; one line says why."""


def one_line(text: str, length: int) -> str:
    """The text without line breaks, cut to `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def shown(value: object) -> str:
    """A short `repr` on one line, for any value: an array, a huge or a bad one."""
    try:
        return one_line(_SHORT.repr(value), 100)
    except Exception:  # a repr may fail in any way, and only makes a message here
        return f"a value of type {type(value).__name__}"


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ConfigError with field, value and what is allowed, unless `condition`."""
    if not condition:
        raise _refusal(field, value, allowed)


def _refusal(field: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{field}={shown(value)} is not allowed: it must be {allowed}")


def _is_scalar_of(value: object, kinds: str) -> bool:
    """Whether an array library's value is one number of the kinds "i", "u", "f"."""
    if isinstance(value, bool | str | bytes | bytearray | complex):
        return False
    try:
        dtype = getattr(value, "dtype", None)
        if dtype is None:
            return True
        name = str(dtype).rpartition(".")[2]  # torch.int64, int64, bfloat16
        if getattr(value, "ndim", 0) != 0:
            return False
    except Exception:  # an object of anyone's, which may fail at any attribute
        return False
    return any(name.startswith(kind) for kind in kinds.split())


def _as_integer(value: object) -> int | None:
    """Any library's integer as an `int`; None for all else, booleans included."""
    if not _is_scalar_of(value, "int uint"):
        return None
    try:
        return operator.index(value)  # pyrefly: ignore[bad-argument-type]
    except Exception:  # an object's own __index__ may raise anything
        return None


def _as_number(value: object) -> float | None:
    """Any library's finite real number as a `float`; None for all else."""
    # Bytes of any library would be read as text by `float`.
    kind = type(value)
    if not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        return None
    if not _is_scalar_of(value, "int uint float bfloat"):
        return None
    try:
        found = float(value)  # pyrefly: ignore[bad-argument-type]
    except Exception:  # too large an integer, or an object's own __float__
        return None
    return found if math.isfinite(found) else None


# The checks are classes and not functions in functions: one that is made anew for every
# configuration would be decorated anew where types are checked while tests run.
@dataclasses.dataclass(frozen=True)
class _Integer:
    least: int
    most: int
    hint: str

    def __call__(self, field: str, value: object) -> int:
        found = _as_integer(value)
        if found is not None and found > self.most:
            raise _refusal(field, value, f"at most {self.most}{self.hint}")
        if found is None or found < self.least:
            allowed = f"an integer of at least {self.least}{self.hint}"
            raise _refusal(field, value, allowed)
        return found


def integer(least: int, most: int = LARGEST, *, hint: str = "") -> Check[int]:
    """A check for an integer of any library, in a range.

    Args:
      least, most: The range, both included.
      hint: What to say beside it, as " (0 is off)".
    """
    return _Integer(least, most, hint)


@dataclasses.dataclass(frozen=True)
class _Number:
    above: int | float | None
    least: int | float | None
    most: int | float | None
    hint: str

    def __call__(self, field: str, value: object) -> float:
        found = _as_number(value)
        if (
            found is None
            or (self.above is not None and not found > self.above)
            or (self.least is not None and not found >= self.least)
            or (self.most is not None and not found <= self.most)
        ):
            raise _refusal(field, value, self._allowed())
        return found

    def _allowed(self) -> str:
        text = "a finite number"
        if self.above is not None:
            text += f" above {self.above:g}"
        if self.least is not None:
            text += f" of at least {self.least:g}"
        if self.most is not None:
            text += f" and at most {self.most:g}"
        return text + self.hint


def number(
    *,
    above: int | float | None = None,
    least: int | float | None = None,
    most: int | float | None = None,
    hint: str = "",
) -> Check[float]:
    """A check for a finite real number of any library, in a range.

    Args:
      above: What it must be above; or
      least: the least that it may be.
      most: The most that it may be.
      hint: What to say beside it, as " (0 is greedy)".
    """
    return _Number(above, least, most, hint)


def flag(field: str, value: object) -> bool:
    """Checks a boolean, NumPy's included; no number stands for one."""
    if not isinstance(value, bool | np.bool_):
        raise _refusal(field, value, "True or False")
    return bool(value)


def text(field: str, value: object) -> str:
    """Checks a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise _refusal(field, value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refusal(
            field,
            value[error.start : error.end],
            "valid Unicode (no lone surrogates, which stand for bytes that are not "
            "UTF-8)",
        ) from None
    return str(value)


def non_empty_text(field: str, value: object) -> str:
    """Checks a text that can be written as UTF-8 and holds a character."""
    found = text(field, value)
    require(found != "", field, value, "text of at least one character")
    return found


def path(field: str, value: object) -> str:
    """Checks a path: text or `os.PathLike`, not empty, without a null character.

    Bytes that are not UTF-8 are taken, as the file system takes them.
    """
    found, encoded = None, b""
    if isinstance(value, str | os.PathLike):
        try:
            found = os.fspath(value)
            encoded = os.fsencode(found)
        except Exception:  # a surrogate that stands for no byte; anyone's __fspath__
            found = None
    if not isinstance(found, str) or not encoded or b"\0" in encoded:
        raise _refusal(field, value, "a path (text or os.PathLike)")
    return found


def file_to_write(field: str, value: object) -> str:
    """Checks the path of a file whose folder is there and can be written to.

    For figures that are written at the end: a slip is told before they are measured.
    """
    found = path(field, value)
    folder = os.path.dirname(os.path.abspath(found))
    other = os.path.exists(found) and not os.path.isfile(found)  # /dev/full, a pipe
    if other or not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(field, value, "a file in a folder that can be written to")
    return found


def text_path(field: str, value: object) -> str:
    """Checks a path that JSON can name, which holds no bytes that are not UTF-8."""
    return text(field, path(field, value))


@dataclasses.dataclass(frozen=True)
class _Choice:
    allowed: tuple[str, ...]

    def __call__(self, field: str, value: object) -> Any:
        if not isinstance(value, str) or value not in self.allowed:
            words = ", ".join(repr(word) for word in self.allowed)
            raise _refusal(field, value, f"one of {words}")
        return str(value)


def choice(*allowed: str) -> Check[Any]:
    """A check for one of several words."""
    return _Choice(allowed)


@dataclasses.dataclass(frozen=True)
class _Instance[T]:
    kind: type[T]
    made_by: str

    def __call__(self, field: str, value: object) -> T:
        if not isinstance(value, self.kind):
            raise _refusal(field, value, f"a {self.kind.__name__}{self.made_by}")
        return value


def instance[T](kind: type[T], made_by: str = "") -> Check[T]:
    """A check for a value of a class of ours.

    Args:
      kind: The class.
      made_by: What to say of where one comes from.
    """
    return _Instance(kind, made_by)


def function(field: str, value: object) -> Callable[..., Any]:
    """Checks something that can be called."""
    if not callable(value):
        raise _refusal(field, value, "a function")
    return value


def float_dtype(field: str, value: object) -> np.dtype:
    """Checks a type of weights and caches, by name or as any library's own."""
    name = value
    # An array or a number has a type, and is none.
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        name = None
    elif value is not None and not isinstance(value, str):
        try:
            name = jnp.dtype(value).name  # pyrefly: ignore[no-matching-overload]
        except Exception:  # NumPy tries the value as several things, then gives up
            name = None
    if name not in FLOAT_DTYPES:
        words = ", ".join(repr(word) for word in FLOAT_DTYPES)
        raise _refusal(field, value, f"one of {words}")
    return jnp.dtype(name)


@dataclasses.dataclass(frozen=True)
class _Optional[T]:
    check: Check[T]

    def __call__(self, field: str, value: object) -> T | None:
        return None if value is None else self.check(field, value)


def optional[T](check: Check[T]) -> Check[T | None]:
    """The check, for values that may be None."""
    return _Optional(check)


@dataclasses.dataclass(frozen=True)
class _Several[T]:
    check: Check[T]
    what: str
    ordered: bool

    def __call__(self, field: str, value: object) -> tuple[T, ...]:
        # Without a length it may not end, and a range may be longer than memory.
        plain = isinstance(value, Collection) and not isinstance(
            value, str | bytes | bytearray | memoryview | Mapping
        )
        # A set would be read in an order that nobody chose.
        plain = plain and not (self.ordered and isinstance(value, Set))
        sized: Any = value
        try:
            count = len(sized) if plain else None
        except Exception:  # an array without axes
            count = None
        if count is None:
            raise _refusal(field, value, f"a sequence of {self.what}")
        if count > _MOST_ENTRIES:
            raise _refusal(field, value, f"at most {_MOST_ENTRIES} {self.what}")
        try:
            read: Any = value.tolist() if hasattr(value, "tolist") else value
            entries = list(read)
        except Exception:  # a deleted array; anyone's own __iter__
            raise _refusal(
                field, value, f"a sequence of {self.what} that can be read"
            ) from None
        return tuple(
            self.check(f"{field}[{i}]", entry) for i, entry in enumerate(entries)
        )


def several[T](
    check: Check[T], what: str, *, ordered: bool = True
) -> Check[tuple[T, ...]]:
    """A check for a flat sequence whose entries pass `check`.

    Args:
      check: Of each entry.
      what: What to call them, as "token ids".
      ordered: Whether their order matters: a set is refused then.
    """
    return _Several(check, what, ordered)


def settle(owner: object, **checks: Check[Any]) -> None:
    """Puts fields of a frozen dataclass through their checks, at construction.

    Each field then holds what its check returned. Every field needs a check.
    """
    assert dataclasses.is_dataclass(owner)
    assert checks.keys() == {field.name for field in dataclasses.fields(owner)}
    for name, check in checks.items():
        value = check(f"{type(owner).__name__}.{name}", getattr(owner, name))
        object.__setattr__(owner, name, value)
