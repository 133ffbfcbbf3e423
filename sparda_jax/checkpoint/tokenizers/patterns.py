"""Regular expressions out of files: only those that cannot take for ever.

The engine of the `tokenizers` library backtracks: `(a+)+b` takes time exponential in
the length of a word. Its limit of retries is a panic, after half a second, and what
stays below takes half a second at every place of a text. So patterns are checked: what
repeats without bound must be one character or class, or a group of fixed form, and few
choices may follow one another.
"""

import re

_MAX_LENGTH = 10_000  # The longest in use, lists of letters, have about 2,000.
_MAX_REPEATS = 3  # Unbounded repeats one after the other; families in use have two.
_MAX_CHOICES = 8  # Optional parts one after the other.
_LONG = 64  # A repeat of more is as good as unbounded.
_MAX_GROUPS = 20

_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((\?(?:[imx]+:|[imx]+\)|[:=!>]|<[=!]))?")
# A reference to a group, a call of one, or a class of the engine's own.
_ESCAPE = re.compile(
    r"\\([pP]\{\^?\w+\}|x[0-9a-fA-F]{2}|x\{\w+\}|u\w{4}|[^1-9gkxpPXRK])"
)


class PatternError(ValueError):
    """The pattern may take for ever, or uses what is not known to be safe."""


class _Sequence:
    """Repeats and choices of what has been read of one alternative."""

    def __init__(self) -> None:
        self.repeats = self.choices = 0
        # The highest of the alternatives before this one.
        self.most_repeats = self.most_choices = 0
        self.alternatives = 1

    def add(self, repeats: int, choices: int) -> None:
        self.repeats += repeats
        self.choices += choices
        self.most_repeats = max(self.most_repeats, self.repeats)
        self.most_choices = max(self.most_choices, self.choices)
        if self.repeats > _MAX_REPEATS:
            raise PatternError(f"more than {_MAX_REPEATS} unbounded repeats in a row")
        if self.choices > _MAX_CHOICES:
            raise PatternError(f"more than {_MAX_CHOICES} optional parts in a row")

    def alternative(self) -> None:
        self.repeats = self.choices = 0
        self.alternatives += 1

    @property
    def is_fixed(self) -> bool:
        """Whether what it matches can only be matched in one way."""
        return self.alternatives == 1 and not self.most_repeats + self.most_choices


def _class_end(pattern: str, at: int) -> int:
    """The place after a `[…]` that begins at `at`; classes may hold classes."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            # A bracket that comes first is a character.
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise PatternError("a class has no end")


def _quantifier(pattern: str, at: int) -> tuple[int, int | None, int]:
    """Least and most repeats of what stands before `at`, and where the pattern goes on.

    None is a most without bound.
    """
    least, most, end = 1, 1, at
    if pattern[at : at + 1] in ("*", "+", "?") and at < len(pattern):
        least = int(pattern[at] == "+")
        most, end = (1 if pattern[at] == "?" else None), at + 1
    elif (count := _COUNT.match(pattern, at)) and count.group() not in ("{}", "{,}"):
        low, comma, high = count.groups()
        least = int(low or 0)
        most = int(high) if high else (None if comma else least)
        end = count.end()
    if most is not None and most > _LONG:
        most = None
    # Lazy and possessive forms take no more time than greedy ones.
    if end > at and pattern[end : end + 1] in ("?", "+"):
        end += 1
    return least, most, end


def check_pattern(pattern: str) -> None:
    """Refuses a regular expression that may take for ever.

    Args:
      pattern: In the syntax of Oniguruma.

    Raises:
      PatternError: It repeats what can match in many ways, is too long, or uses
        references, calls or other things that the usual families do not need.
    """
    if len(pattern) > _MAX_LENGTH:
        raise PatternError(f"{len(pattern)} characters, allowed: {_MAX_LENGTH}")
    stack = [_Sequence()]
    groups = at = 0
    while at < len(pattern):
        character = pattern[at]
        inner: _Sequence | None = None
        if character == "(":
            group = _GROUP.match(pattern, at)
            assert group is not None
            if group.group(1) is None and pattern[at + 1 : at + 2] in ("?", "*"):
                raise PatternError(f"group {pattern[at : at + 4]!r} is not supported")
            groups += 1
            if groups > _MAX_GROUPS:
                raise PatternError(f"more than {_MAX_GROUPS} groups")
            at = group.end()
            # Flags for all that follows, `(?i)`, open no group.
            if not group.group().endswith(")"):
                stack.append(_Sequence())
            continue
        if character == "|":
            stack[-1].alternative()
            at += 1
            continue
        if character == ")":
            if len(stack) == 1:
                raise PatternError("a group that ends was not begun")
            inner = stack.pop()
            at += 1
        elif character == "[":
            at = _class_end(pattern, at)
        elif character == "\\":
            escape = _ESCAPE.match(pattern, at)
            if escape is None:
                raise PatternError(f"escape {pattern[at : at + 4]!r} is not supported")
            at = escape.end()
        else:
            at += 1
        least, most, end = _quantifier(pattern, at)
        again = end > at and _quantifier(pattern, end)[2] > end
        if again:
            raise PatternError("a repeat of a repeat")
        if inner is not None:
            if most != 1 and not inner.is_fixed:
                raise PatternError("a repeat of what can match in many ways")
            stack[-1].add(inner.most_repeats, inner.most_choices)
            if inner.alternatives > 1:
                stack[-1].add(0, 1)
        stack[-1].add(int(most is None), int(most is not None and most != least))
        at = end
    if len(stack) != 1:
        raise PatternError("a group has no end")
