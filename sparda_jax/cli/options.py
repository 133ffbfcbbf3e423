"""Options whose values pass the checks of the public functions' arguments."""

import argparse
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sparda_jax.checks import Check, ConfigError, file_to_write, integer, text
from sparda_jax.cli.ending import add_given, add_options


class HelpFormatter(
    argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
):
    """Keeps examples as they are written, and shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong instead of printing its usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a command's errors then name its options (`run_command`)."""
        add_options(
            {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}
        )
        found = super().parse_known_args(args, namespace)
        add_given(self._given(vars(found[0])))
        return found

    def _given(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Options by the texts and paths that were written behind them."""
        found = {}
        for action in self._actions:
            value = values.get(action.dest)
            if not action.option_strings or value == action.default:
                continue
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str | os.PathLike) and os.fspath(one):
                    option, name = action.option_strings[-1], os.fspath(one)
                    # As it was written, and as a path that is made of it is.
                    found |= {name: option, str(pathlib.Path(name)): option}
        return found

    def print_help(self, file: Any = None) -> None:
        """Prints the help; argparse's own form says nothing of a full disk."""
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str):
        # A check's message names its option; argparse names it once more before it.
        _, _, told = message.partition(": ")
        if message.startswith("argument ") and told.startswith("--"):
            message = told
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_option(
    parser: Any,
    name: str,
    check: Check[Any],
    *,
    help: str,
    metavar: str | None = None,
    default: Any = None,
    required: bool = False,
    repeated: bool = False,
    many: bool = False,
    words: tuple[str, ...] = (),
) -> None:
    """Adds an option that takes one value, or with `many` one or more.

    Args:
      parser: A parser or a group of one.
      name: As it is written, with its dashes.
      check: Of the value, which comes as the number that the text stands for if it
        stands for one.
      help: What it does.
      metavar: How to call its value.
      default: Its value if it is not given.
      required: It must be given.
      repeated: It may be given several times, and the value is a list.
      many: It takes one value or more behind its name, and the value is a list.
      words: The words that it takes, to be shown in place of `metavar`.
    """
    settings: dict[str, Any] = {"required": required, "help": help, "default": default}
    if repeated:
        settings |= {"action": "append", "default": []}
    if many:
        settings["nargs"] = "+"
    shown = "{" + ",".join(words) + "}" if words else metavar
    convert = functools.partial(_convert, name, check)
    parser.add_argument(name, type=convert, metavar=shown, **settings)


def add_file_option(
    parser: Any,
    name: str = "--json",
    *,
    help: str = "also write figures here",
    required: bool = False,
) -> None:
    """Adds the option of a file to write, whose value is a `pathlib.Path`.

    Its folder is looked at before anything is measured, not when there are figures.

    Args:
      parser: A parser or a group of one.
      name: As it is written, with its dashes.
      help: What is written.
      required: It must be given.
    """
    add_option(parser, name, _file, metavar="FILE", help=help, required=required)


def _file(field: str, value: object) -> pathlib.Path:
    return pathlib.Path(file_to_write(field, value))


def _convert(name: str, check: Check[Any], written: str) -> Any:
    """The option's value, from the text or from the number that it stands for."""
    try:
        try:
            return check(name, written)
        except ConfigError:
            number = _number(written)
            if number is None:
                raise
            return check(name, number)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(written: str) -> int | float | None:
    """The number that a text stands for, or None."""
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:  # no number, or one of thousands of digits
            continue
    return None


# In the order of `sparda_jax.hosts.join_hosts`.
HOSTS_OPTIONS = ("coordinator", "num_processes", "process_id")


def add_hosts_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which processes of several hosts meet."""
    group = parser.add_argument_group("several hosts (jax.distributed)")
    for name, check, unit, about in (
        ("--coordinator", text, "HOST:PORT", "address of the first process"),
        ("--num-processes", integer(1), "N", "how many there are"),
        ("--process-id", integer(0), "I", "which of them this is, from 0"),
    ):
        add_option(group, name, check, metavar=unit, help=about)
