"""Which characters of a rendered chat come from its contents, not from the template.

Only the template's own markers are control tokens; a document may hold the same text.
A template may cut, join and trim what it is given, so a marker can also come about from
pieces of contents. Therefore the characters with which markers begin are exchanged for
stand-ins in all contents before the template runs: a marker in its output that begins
with a stand-in is not the template's. Lengths stay, so that both forms of the output
can be compared place by place.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Unicode gives these no meaning: templates neither trim nor change their case.
_STAND_INS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))

_CODE = re.compile(r"\{[{%](.*?)[}%]\}", re.DOTALL)
_LITERAL = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_STRING = re.compile(_LITERAL, re.DOTALL)
# A literal that the template looks for in another string.
_SOUGHT = re.compile(
    rf"""(?<=[(])\s*(?:{_LITERAL})       # of a method that is named before the bracket
       | (?:{_LITERAL})(?=\s*(?:not\s+)?in\b|\s*[=!]=)
       | (?<=[=!]=)\s*(?:{_LITERAL})""",
    re.DOTALL | re.VERBOSE,
)
_SEEKS = re.compile(
    r"\.(?:r?split|r?partition|replace|startswith|endswith|r?find|r?index|count"
    r"|[lr]?strip|removeprefix|removesuffix)\s*\($"
)


def _value(literal: str) -> str | None:
    """The string that a literal stands for, None if it is no valid one."""
    try:
        return str(ast.literal_eval(literal))
    except (ValueError, SyntaxError):
        return None


def _strings_of(source: str) -> Iterator[str]:
    """The string literals of a template."""
    for code in _CODE.findall(source):
        for literal in _STRING.findall(code):
            value = _value(literal)
            if value is not None:
                yield value


def _may_begin(text: str, name: str) -> bool:
    return name.startswith(text) or text.startswith(name)


class ContentMarks:
    """Exchanges the first characters of markers in contents for stand-ins.

    Strings that the template itself looks for, such as `<think>`, are left as they are
    where no marker can begin in them, so that the template does as it always does.

    Args:
      names: The markers: texts of the special tokens.
      source: The template.
      values: Contents that will be marked.
      normalize: What the tokenizer does to a text before it looks for markers, None if
        it looks in the text as it is.
    """

    def __init__(
        self,
        names: Iterable[str],
        source: str,
        values: Iterable[Any],
        normalize: Callable[[str], str] | None = None,
    ) -> None:
        names = [name for name in names if name.strip()]
        self._names = tuple(names)
        text = json.dumps(list(values), ensure_ascii=False)
        # Letters stand in the names of roles and types, which templates compare: they
        # are exchanged only where a whole marker stands.
        whole = [name for name in names if name[0].isalnum()]
        first = {name[0] for name in names} - {name[0] for name in whole}
        if normalize is not None:
            first |= {c for c in set(text) - first if first & set(normalize(c))}
        first = {c for c in first if not c.isalnum() and not c.isspace()}
        marked = first | {name[0] for name in whole}
        self._to = self._table(sorted(marked), source + text)
        self._from = {ord(after): before for before, after in self._to.items()}
        left = {
            literal
            for literal in _strings_of(source)
            if len(literal) > 1 and self._is_harmless(literal, first, names)
        }
        parts = [*sorted(left, key=len, reverse=True)]
        alternatives = [f"(?P<left>{'|'.join(map(re.escape, parts))})"] if parts else []
        alternatives += [re.escape(name) for name in whole]
        alternatives += [re.escape(c) for c in sorted(first)]
        self._pattern = re.compile("|".join(alternatives)) if marked else None
        self._has_left = bool(parts)

    @staticmethod
    def _is_harmless(literal: str, first: set[str], names: Iterable[str]) -> bool:
        starts = [n for n, character in enumerate(literal) if character in first]
        return bool(starts) and not any(
            _may_begin(literal[start:], name) for start in starts for name in names
        )

    @staticmethod
    def _table(characters: Iterable[str], seen: str) -> dict[str, str]:
        free = (chr(code) for codes in _STAND_INS for code in codes)
        # A template may write a stand-in as JSON writes it in ASCII.
        unused = (
            stand_in
            for stand_in in free
            if stand_in not in seen and json.dumps(stand_in)[1:-1] not in seen
        )
        return dict(zip(characters, unused, strict=False))

    def _exchange(self, match: re.Match[str]) -> str:
        found = match.group()
        if self._has_left and match.group("left") is not None:
            return found
        return self._to[found[0]] + found[1:]

    def mark(self, value: Any) -> Any:
        """A copy of a value, of what JSON can hold, with all its strings marked."""
        if isinstance(value, str) and self._pattern is not None:
            return self._pattern.sub(self._exchange, value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value

    def seeking(self, source: str, values: Iterable[Any]) -> str | None:
        """A template that looks for whole markers as they now stand in contents.

        Many cut what precedes `</think>` off an answer. Where that is the name of a
        special token as well, the contents no longer hold it as the template writes it.
        What a template writes itself stays as it is.

        Args:
          source: The template.
          values: The contents, not marked.

        Returns:
          The template with marked literals; None if it looks for no marker that a
          content holds.
        """
        text = json.dumps(list(values), ensure_ascii=False)
        held = [name for name in self._names if json.dumps(name)[1:-1] in text]

        def in_code(code: re.Match[str]) -> str:
            inside = code.group()

            def exchange(match: re.Match[str]) -> str:
                literal = match.group()
                before = inside[: match.start()]
                value = _value(literal.strip()) or ""
                if before.endswith("(") and not _SEEKS.search(before):
                    return literal
                if not any(name in value for name in held):
                    return literal
                return self.mark(literal)

            return _SOUGHT.sub(exchange, inside)

        changed = _CODE.sub(in_code, source)
        return None if changed == source else changed

    def found(self, text: str) -> str:
        """The template's output with every stand-in as one character."""
        for stand_in in self._to.values():
            text = text.replace(json.dumps(stand_in)[1:-1], stand_in)
        return text

    def restore(self, text: str) -> str:
        """The output of `found` with the contents' own characters."""
        return text.translate(self._from)
