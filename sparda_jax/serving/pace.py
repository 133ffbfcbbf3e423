"""How many tokens of every row a call of decode has."""

# Of one call, where more than one step fits.
_MOST_SECONDS = 0.2


class Pace:
    """Learns how long a step is: a call has as many as a fifth of a second holds.

    A call costs something beside its steps (2 ms for an 8B model on an H200); who comes
    or goes meanwhile waits for its end.

    Args:
      most_steps: Of one call.
    """

    def __init__(self, most_steps: int):
        self._most_steps = most_steps
        # Seconds of a step with what the call costs beside it; 0: not known yet.
        self._step = 0.0

    @property
    def steps(self) -> int:
        """Of the next call."""
        fit = int(_MOST_SECONDS / self._step) if self._step else 1
        return max(1, min(fit, self._most_steps))

    def took(self, steps: int, seconds: float, *, whole: bool = True) -> None:
        """A call of so many steps has taken so long.

        Args:
          steps: Of the call.
          seconds: Of the call. The time of a step at most halves.
          whole: Every step ran: rows go on. Else all may have ended early, and a step
            takes at least that long.
        """
        least = self._step / 2 if whole else self._step
        self._step = max(seconds / steps, least, 1e-6)
