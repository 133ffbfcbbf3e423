"""How a command ends: with its result, or with one line on standard error."""

import contextvars
import io
import os
import re
import sys
from collections.abc import Callable, Mapping

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError, one_line
from sparda_jax.cli.starting import interrupt_is_heeded

_REFUSALS = (ConfigError, CheckpointError)
# What a message begins with that is about an argument: options that are named already,
# and the argument's own name.
_ARGUMENT = re.compile(
    r"((?:--[\w-]+=(?:'[^']*'|[^\s,]+), )*)(?:[A-Z]\w*[a-z]\w*\.)?([a-z]\w*)(?==)"
)
_options: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("options")
_given: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("given")


def add_options(options: Mapping[str, str]) -> None:
    """Tells the command that runs which options it has, by the name of their value."""
    _options.set({**_options.get({}), **options})


def add_given(options: Mapping[str, str]) -> None:
    """Tells it which option each text was given to: what files are called by."""
    _given.set({**options, **_given.get({})})


def _naming_options(text: str) -> str:
    """A message of the library, which names arguments, with options in their place.

    One of a file names it first: that, or the directory it lies in, may be an option's.
    """
    known = _options.get({})
    while (found := _ARGUMENT.match(text)) and found[2] in known:
        text = f"{found[1]}{known[found[2]]}{text[found.end() :]}"
    for name, option in _given.get({}).items():
        if text.startswith((f"{name}: ", f"{name}, ")):
            return f"{option}={text}"
        if text.startswith(f"{name.rstrip(os.sep)}{os.sep}"):
            return f"{option}={name}: {text}"
    return text


def _told(error: OSError) -> str:
    """What an error of the system says, beginning with the file where there is one."""
    if isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_line(text: str) -> None:
    """Prints one line to standard error, whatever characters the text holds."""
    text = text.encode("utf-8", "backslashreplace").decode()
    print(one_line(text, 1000), file=sys.stderr, flush=True)


def run_command(
    action: Callable[[], None],
    *,
    prefix: str = "",
    refusals: tuple[type[Exception], ...] = _REFUSALS,
    interrupted: str = "",
) -> int:
    """Runs a command; returns its exit status.

    Args:
      action: What it does.
      prefix: What a line begins with.
      refusals: Errors that are not faults of ours: their line is all that is said.
      interrupted: What to say after Ctrl-C, besides that it was one.

    Returns:
      0; 2 after a refusal or where the output cannot be written; 130 after Ctrl-C; 141
      if nobody reads the output.
    """
    _open_closed_streams()
    before, given = _options.set({}), _given.set({})
    try:
        try:
            _take_any_text()
            with interrupt_is_heeded():
                action()
        finally:
            # What is still held back: a full disk would else be told at exit, or never.
            sys.stdout.flush()
    except refusals as error:
        print_line(f"{prefix}{_naming_options(str(error))}")
        return 2
    except KeyboardInterrupt:
        print_line(f"{prefix}interrupted{interrupted}")
        return 130
    except BrokenPipeError:
        _give_up_output()
        return 141
    except OSError as error:
        _give_up_output()
        print_line(f"{prefix}{_naming_options(_told(error))}")
        return 2
    finally:
        _options.reset(before)
        _given.reset(given)
    return 0


def _open_closed_streams() -> None:
    """Gives a command that was started without streams, as by `<&-`, empty ones.

    Python has None in their place, and the next files that are opened their numbers.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _take_any_text() -> None:
    """Lets the output take names and answers that its encoding cannot write.

    They are written with escapes, as errors are: a path with bytes that are not UTF-8,
    or a letter where the terminal knows ASCII alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Leaves nothing to fail at when the interpreter writes what is left, at exit."""
    try:
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    except (OSError, ValueError):  # no file behind it: nothing is left to write
        pass
