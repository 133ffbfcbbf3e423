"""What the processes of one run must agree on."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparda_jax.config import ConfigError


def from_first(value: int) -> int:
    """The first process's value, in all of them.

    Every process must call it at the same place. Alone it costs nothing.
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def on_first(action: Callable[[], object]) -> None:
    """Runs `action` in the first process alone; its failure ends all of them.

    Raises:
      ConfigError: In the other processes, where it failed. In the first one, whatever
        it raised.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    if from_first(int(failure is not None)):
        raise failure or ConfigError("process 0 refused the run: see its message")
