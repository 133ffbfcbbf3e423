"""Chat templates: Jinja programs out of model files, run in a process with limits.

A template comes with the weights, from whoever made the file. It is rendered as
transformers does it, in Jinja's immutable sandbox, which denies attributes such as
`__class__`; and in a child process whose time, memory and output are limited, so that a
hostile or broken one ends in an error rather than in a hang or in all memory taken.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.render_process import (
    RenderError,
    RenderLimits,
    RenderProcess,
)
from sparda_jax.checks import ConfigError, flag

_MAX_SOURCE = 1 << 18  # The longest in use have about 30,000 characters.
_MAX_DEPTH = 100


def _plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy of what JSON can hold; refuses everything else by name."""
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{field} is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{field} = {show(value)} is not a string of valid Unicode"
            ) from error
        return str(value)
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= 1 << 64:
            raise ConfigError(f"{field} = {show(value)} is not below 2^64")
        return int(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # a fraction
            raise ConfigError(f"{field} = {show(value)} is not below 2^1024") from None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{field} has the key {show(key)}, allowed: strings")
        return {
            _plain(key, field): _plain(item, f"{field}[{show(key)}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            _plain(item, f"{field}[{number}]", depth + 1)
            for number, item in enumerate(value)
        ]
    raise ConfigError(
        f"{field} = {show(value)} is not allowed: it must be of mappings, lists, "
        "strings, numbers, booleans and None"
    )


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise ConfigError(
            f"messages = {show(messages)} must be a list of mappings with 'role' and "
            "'content'"
        )
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"messages[{number}] = {show(message)} must be a mapping with 'role' "
                "and 'content'"
            )
        checked.append(_plain(message, f"messages[{number}]"))
    if not checked:
        raise ConfigError("messages must hold at least one message")
    return checked


# Arguments of `apply_chat_template` in transformers that are no variables of a
# template: it would take them without a word, and they would do nothing.
_NO_VARIABLES = {
    "continue_final_message": "answer_prefix takes how the answer begins",
    "chat_template": "the model's own template is used",
    "tokenize": "chat gives text and encode_chat token ids",
    "return_tensors": "encode_chat gives a list of token ids",
    "return_dict": "encode_chat gives a list of token ids",
}


def chat_variables(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> dict[str, Any]:
    """The variables of a rendering, checked; arguments as in `ChatTemplate.render`."""
    plain = {name: _plain(value, name) for name, value in variables.items()}
    for name, instead in _NO_VARIABLES.items():
        if plain.get(name):
            raise ConfigError(f"{name} is not allowed in a chat: {instead}")
    return {
        "tools": None,
        "documents": None,
        **plain,
        "messages": _check_messages(messages),
        "add_generation_prompt": flag("add_generation_prompt", add_generation_prompt),
    }


class ChatTemplate:
    """A chat template.

    Args:
      source: The Jinja program.
      where: File and field that it comes from, for messages.
      variables: Names it may use, such as `bos_token` and `eos_token`.
      limits: What one rendering may use.

    Raises:
      CheckpointError: It is too long.
    """

    def __init__(
        self,
        source: str,
        where: str,
        variables: Mapping[str, str],
        limits: RenderLimits | None = None,
    ) -> None:
        self._where = where
        self._variables = dict(variables)
        if len(source) > _MAX_SOURCE:
            raise self._error(f"{len(source)} characters, allowed: {_MAX_SOURCE}")
        self.source = source
        self._process = RenderProcess(source, limits)

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: chat template: {reason}")

    def close(self) -> None:
        """Ends the process that renders; another rendering starts another one."""
        self._process.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes a conversation in the model's own form.

        Args:
          messages: Each with `role` and `content`.
          add_generation_prompt: End with the opening of the assistant's answer.
          **variables: Further variables of the template, of what JSON can hold, such
            as `tools`, `documents` or `enable_thinking`.

        Returns:
          The text; it holds special tokens as text.

        Raises:
          ConfigError: `messages` is empty or malformed, or a variable is no JSON.
          CheckpointError: The template is no valid one, failed, refused the messages,
            did what the sandbox forbids or went over a limit.
        """
        return self.render_variables(
            chat_variables(
                messages, add_generation_prompt=add_generation_prompt, **variables
            )
        )

    def render_variables(self, variables: Mapping[str, Any]) -> str:
        """Renders with what `chat_variables` returned, or a value of the same kind."""
        try:
            return self._process.render(self._variables | dict(variables))
        except RenderError as error:
            raise self._error(str(error)) from error
