"""What a scheduler tells of itself."""

from sparda_jax.engine.session import Session
from sparda_jax.serving.jobs import Job


class Observer:
    """Called in the engine's thread; must not block. This one is silent."""

    def round(self, session: Session, *, waiting: int, running: int) -> None:
        """A round has ended."""

    def tokens(self, job: Job, count: int, now: float) -> None:
        """A job has got tokens; its times are those before them."""

    def ended(self, job: Job, reason: str) -> None:
        """A job has ended."""

    def failed(self, error: Exception) -> None:
        """The engine has stopped."""
