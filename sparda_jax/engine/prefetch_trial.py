"""`prefetch="auto"`: the first steps of a session, decoded on demand and measured."""

from sparda_jax.engine.compile_cache import BoundedCache
from sparda_jax.planning.auto import PROBE_TIMED, PROBE_WARM, Probe

# What the first steps showed, by all that the programs depend on: measured once.
PROBES: BoundedCache[Probe] = BoundedCache(256)


class PrefetchTrial:
    """Counts the first steps, over as many calls as they take.

    Attributes:
      warm: Steps that were not measured.
      timed: Steps that were.
      seconds: Time of the measured steps.
      fetched: Blocks that these fetched.
    """

    def __init__(self) -> None:
        self.warm = 0
        self.timed = 0
        self.seconds = 0.0
        self.fetched = 0

    @property
    def complete(self) -> bool:
        """Whether there is enough to decide by."""
        return self.timed >= PROBE_TIMED

    def most(self, steps: int) -> int:
        """How many of the next `steps` steps may be taken in one call."""
        if self.warm < PROBE_WARM:
            return min(steps, PROBE_WARM - self.warm)
        return min(steps, PROBE_TIMED - self.timed)

    def add(self, steps: int, seconds: float, fetched: int) -> None:
        """Takes in a call of at most that many steps."""
        if self.warm < PROBE_WARM:
            self.warm += steps
            return
        self.timed += steps
        self.seconds += seconds
        self.fetched += fetched

    def unfinished(self) -> str:
        """What to say of a session that ended before the decision."""
        return (
            f"on demand: {self.warm + self.timed} steps were too few to decide by "
            f"({PROBE_WARM + PROBE_TIMED} are needed)"
        )
