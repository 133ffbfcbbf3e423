"""How long tests wait for what must come. It ends what hangs, and decides nothing."""

import time
from collections.abc import Callable

# Seconds; pytest ends a test later (`timeout` in pyproject.toml).
PATIENCE = 1800.0


def until(condition: Callable[[], object], what: str = "it does not come to be so"):
    """Waits for a condition, looking often."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)
