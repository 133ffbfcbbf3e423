"""How the trainer's commands end: a result, or one line on standard error."""

from collections.abc import Callable

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from sparda_jax.cli import ending


class TrainingError(RuntimeError):
    """Training cannot go on."""


def run_command(action: Callable[[], None], *, interrupted: str = "") -> int:
    """Runs a command; returns its exit status.

    Args:
      action: What it does.
      interrupted: What to say after Ctrl-C, besides that it was one.

    Returns:
      0; 2 after a wrong value, a damaged file, a full disk or a training that cannot go
      on; 130 after Ctrl-C; 141 if nobody reads the output.
    """
    return ending.run_command(
        action,
        prefix="sparda: ",
        refusals=(ConfigError, CheckpointError, TrainingError),
        interrupted=interrupted,
    )
