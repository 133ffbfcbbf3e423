"""`sparda completion`: a script with which a shell completes the other commands.

The script is written once, so that no key press starts Python and JAX.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from sparda_jax.checks import ConfigError

SHELLS = ("bash", "zsh", "tcsh")


def add_completion_parser(
    commands: Any, parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Adds the subcommand; `parser` makes the parser that is to be completed."""
    completion = commands.add_parser(
        "completion",
        help="print a script that completes these commands in a shell",
        description="Print a script that completes these commands in a shell: "
        'source <(sparda completion bash). It needs pip install "sparda-jax[shell]".',
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(run=lambda arguments: _print(arguments.shell, parser()))


def _print(shell: str, parser: argparse.ArgumentParser) -> None:
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError as error:
        raise ConfigError(
            "completion needs the package shtab: pip install 'sparda-jax[shell]'"
        ) from error
    print(shtab.complete(parser, shell))
