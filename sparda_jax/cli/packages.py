"""Packages that only some commands need."""

import contextlib
from collections.abc import Generator

from sparda_jax.checks import ConfigError
from sparda_jax.cli.ending import print_line

_OURS = ("sparda_jax", "pallas_kernels", "train", "benchmarks")


@contextlib.contextmanager
def needs(extra: str) -> Generator[None]:
    """An import within the block that finds no package says which extra brings it.

    Args:
      extra: The name of the extra in pyproject.toml.

    Raises:
      ConfigError: If a package that is not ours is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _OURS:
            raise
        raise ConfigError(
            f"a package is missing ({error.name}): pip install 'sparda-jax[{extra}]'"
        ) from error


@contextlib.contextmanager
def command_needs(extra: str, module: str) -> Generator[None]:
    """The imports of a module that is also a command, for what not everybody installs.

    Args:
      extra: The name of the extra in pyproject.toml.
      module: The module's `__name__`. Where it is run, a missing package ends the
        process with one line and status 2; where it is imported, it is Python's error.
    """
    if module != "__main__":
        yield
        return
    try:
        with needs(extra):
            yield
    except ConfigError as error:
        print_line(f"sparda: {error}")
        raise SystemExit(2) from None
