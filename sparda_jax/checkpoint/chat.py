"""Chat templates: Jinja programs out of model files, run in a sandbox with bounds.

A template comes with the weights, from whoever made the file. It is run in Jinja's
immutable sandbox, which denies attributes such as `__class__`, and here its loops,
strings and output are bounded too, so that a hostile or broken one ends in an error
rather than in a hang or in all memory taken. The bounds stop the plain ways to waste
time and memory, they are no proof against every one.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sparda_jax.checkpoint.errors import CheckpointError, show

_MAX_SOURCE = 1 << 18
_MAX_TEXT = 1 << 26  # Characters of a string or of the output, 64 Mi.
_MAX_STEPS = 1_000_000  # Loop rounds of one rendering.

# Methods and filters whose result can be far longer than their arguments.
_PADDING = frozenset(
    {"ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map"}
)
_PADDING_FILTERS = ("center", "format", "wordwrap")
_MAX_INDENT = 16


class _TemplateError(Exception):
    """The template asked for an error, or went over a bound."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks the answer's part, prints it."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns the body between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _checked(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple) and len(value) > _MAX_TEXT:
        raise _TemplateError(f"a value grew over {_MAX_TEXT} elements")
    return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds on operators and without padding methods."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Refuses an operator whose result would be huge."""
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                    if len(sequence) * count > _MAX_TEXT:
                        raise _TemplateError(f"a value grew over {_MAX_TEXT} elements")
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise _TemplateError(f"operator {operator} is not allowed here")
        return _checked(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Also refuses the methods that pad; `{{ x.y }}` comes here."""
        _refuse_padding(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Also refuses the methods that pad; `{{ x['y'] }}` comes here."""
        _refuse_padding(obj, argument)
        return super().getitem(obj, argument)


def _refuse_padding(obj: Any, attribute: Any) -> None:
    # `is_safe_attribute` is too late for `format`, which the sandbox wraps before it.
    text = isinstance(obj, str | bytes) and isinstance(attribute, str)
    if text and attribute in _PADDING:
        raise _TemplateError(f"the method {attribute} is not allowed here")


def _raise_exception(message: object) -> None:
    raise _TemplateError(str(message))


def _check_indent(width: Any) -> None:
    if not isinstance(width, int) or not 0 <= width <= _MAX_INDENT:
        raise _TemplateError(f"indent = {show(width)}, allowed: 0 to {_MAX_INDENT}")


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    _check_indent(width)
    return jinja2.filters.do_indent(text, width, first, blank)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own `tojson` escapes HTML characters, which a prompt must not have.
    if indent is not None:
        _check_indent(indent)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern[:1000])


def _concat(*values: Any) -> str:
    parts = [str(value) for value in values]
    if sum(map(len, parts)) > _MAX_TEXT:
        raise _TemplateError(f"a value grew over {_MAX_TEXT} characters")
    return "".join(parts)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.filters["indent"] = _indent
    for name in _PADDING_FILTERS:
        environment.filters.pop(name, None)
    environment.globals.pop("lipsum", None)
    return environment


def _compile(environment: _Environment, source: str) -> jinja2.Template:
    """Compiles with every loop counted and every `~` bounded."""
    tree = environment.parse(source)
    for loop in tree.find_all(jinja2.nodes.For):
        name = jinja2.nodes.Name("_counted", "load")
        loop.iter = jinja2.nodes.Call(name, [loop.iter], [], None, None)
    for concat in list(tree.find_all(jinja2.nodes.Concat)):
        name = jinja2.nodes.Name("_concat", "load")
        call = jinja2.nodes.Call(name, concat.nodes, [], None, None)
        concat.nodes = [call]
    tree.set_environment(environment)
    # A tree keeps no text, so compile() would not know the source lines.
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


class _Counter:
    """Counts the rounds of all loops of one rendering."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                raise _TemplateError(f"more than {_MAX_STEPS} rounds of loops")
            yield item


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages[{number}] = {show(message)} must be a mapping with 'role' "
                "and 'content'"
            )
        checked.append(dict(message))
    if not checked:
        raise ValueError("messages must hold at least one message")
    return checked


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: The Jinja program.
      where: File and field that it comes from, for messages.
      variables: Names it may use, such as `bos_token` and `eos_token`.

    Raises:
      CheckpointError: It is too long or no valid Jinja program.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str]) -> None:
        self._where = where
        self._variables = dict(variables)
        if len(source) > _MAX_SOURCE:
            raise self._error(f"{len(source)} characters, allowed: {_MAX_SOURCE}")
        try:
            self._template = _compile(_environment(), source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            raise self._error(_one_line(error)) from error

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: chat template: {reason}")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Writes a conversation in the model's own form.

        Args:
          messages: Each with `role` and `content`.
          add_generation_prompt: End with the opening of the assistant's answer.

        Returns:
          The text; it holds special tokens as text.

        Raises:
          ValueError: `messages` is empty or malformed.
          CheckpointError: The template failed, refused the messages, did what the
            sandbox forbids or went over a bound.
        """
        context = {
            **self._variables,
            "messages": _check_messages(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "_counted": _Counter(),
            "_concat": _concat,
        }
        parts, length = [], 0
        try:
            for part in self._template.generate(context):
                length += len(part)
                if length > _MAX_TEXT:
                    raise _TemplateError(f"the output grew over {_MAX_TEXT} characters")
                parts.append(part)
        # A template is a program of its own: it can raise whatever Python raises.
        except Exception as error:
            raise self._error(_one_line(error)) from error
        return "".join(parts)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
