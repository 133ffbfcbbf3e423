"""How the trainer's commands end: a result, or one line on standard error."""

import sys
from collections.abc import Callable

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError, one_line


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
    try:
        action()
        sys.stdout.flush()
    except (ConfigError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_output()
        return 141
    except OSError as error:  # A full disk behind the output, or the like.
        print(f"error: {one_line(str(error), 300)}", file=sys.stderr)
        _give_up_output()
        return 2
    return 0


def _give_up_output() -> None:
    """Leaves the interpreter nothing to write, and to fail at, when it ends."""
    sys.stdout = None  # pyrefly: ignore[bad-assignment]
