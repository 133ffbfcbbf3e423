"""Packages that only some commands need."""

import contextlib
from collections.abc import Generator

from sparda_jax.checks import ConfigError

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
