"""Who runs when: jobs wait, take a row of one session, run, and leave it.

The rules, all of them:

  admission   first come, first served. A job that can be served at all fits any row:
              every row has its whole context on the device and in host memory from the
              start, so a free row is free host blocks as well.
  prefill     one piece of one prompt a round, or some from the prefix store; of several
              rows that still read their prompts, round-robin. Outputs of one
              prompt, and prompts that begin alike, run each whole piece once.
  decode      the tokens of all other rows that a fifth of a second holds, in one call,
              at most `decode_steps` (`serving.pace`); one token while a prompt is read.
              Who comes or goes meanwhile waits for its end.
  preemption  none: a job that has a row keeps it until it ends.
  the end     when it has its tokens, is cancelled, or its time is up; the row is free
              before the next round.

Threads: `submit`, `cancel`, `drain` and `rows` may be called from any thread. The
session belongs to the thread that `start` begins.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Sequence

from sparda_jax.checks import ConfigError
from sparda_jax.engine.results import StreamEvent, TokenLogprobs
from sparda_jax.engine.row_request import RowOutput
from sparda_jax.engine.session import Session
from sparda_jax.serving.jobs import Delivery, Ended, Job, Refused
from sparda_jax.serving.observer import Observer
from sparda_jax.serving.pace import Pace


class Scheduler:
    """Runs jobs on a session; see the module's text.

    Attributes:
      failure: Why the engine has stopped, if it has.
    """

    def __init__(
        self,
        session: Session,
        observer: Observer,
        *,
        max_waiting: int,
        decode_steps: int,
    ):
        self._session, self._observer = session, observer
        self._max_waiting, self._pace = max_waiting, Pace(decode_steps)
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, Job] = {}
        # Rows whose prompts have not all run; the first is next.
        self._filling: collections.deque[int] = collections.deque()
        self._wake = threading.Condition()
        self._closing = self._abort = False
        self.failure: str | None = None
        self._thread = threading.Thread(
            target=self._run, name="sparda-engine", daemon=True
        )

    def start(self) -> None:
        """Begins the engine's thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Lets jobs wait for rows, all of them or none.

        Raises:
          Refused: If too many wait, or the server is about to stop or has failed.
        """
        now = time.monotonic()
        with self._wake:
            if self.failure is not None:
                raise Refused(f"the engine has failed: {self.failure}")
            if self._closing:
                raise Refused("the server is stopping")
            # Jobs that free rows take at once do not wait.
            room = self._max_waiting + self._session.rows - len(self._running)
            if len(self._waiting) + len(jobs) > room:
                raise Refused(
                    f"{len(self._waiting)} outputs wait already: at most "
                    f"{self._max_waiting} may (--max-waiting)"
                )
            for job in jobs:
                job.times["submitted"] = now
                job.times.setdefault("arrived", now)
                self._waiting.append(job)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs, wherever they are; they deliver nothing any more."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def end(self, jobs: Sequence[Job]) -> None:
        """Ends jobs, wherever they are; they deliver that as their end."""
        with self._wake:
            for job in jobs:
                job.dismissed = True
            self._wake.notify()

    def drain(self, *, abort: bool) -> None:
        """Takes no further jobs; those that it has end, or are ended."""
        with self._wake:
            self._closing = True
            self._abort |= abort
            self._wake.notify()

    def stop(self, *, abort: bool = False) -> None:
        """`drain`, and waits for the engine's thread."""
        self.drain(abort=abort)
        self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._wake:
            return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Outputs that have no row yet."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and has not failed."""
        return self._thread.is_alive() and self.failure is None

    def accepts(self) -> bool:
        """Whether a job would be taken now, but for its length."""
        return self.alive and not self._closing

    def rows(self) -> list[tuple[int, Job]]:
        """The rows that are taken, with their jobs."""
        with self._wake:
            return sorted(self._running.items())

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while True:
                with self._wake:
                    while not (self._waiting or self._running or self._closing):
                        self._wake.wait()
                    if self._closing and not (self._waiting or self._running):
                        return
                self.round()
        except Exception as error:  # whatever the device says: nobody shall wait for it
            self.failure = f"{type(error).__name__}: {error}"
            self._observer.failed(error)
            with self._wake:
                left = [*self._waiting, *self._running.values()]
                self._waiting.clear()
                self._running.clear()
            for job in left:
                self._end(job, "failed", message=self.failure)

    def round(self) -> None:
        """One round: who is gone leaves, who waits joins, a prompt's piece, decode."""
        self._drop()
        self._admit()
        if self._prefill():
            self._deliver()  # a first token does not wait for the step
        if len(self._running) > len(self._filling):
            self._decode()
        self._deliver()
        waiting, taken = len(self._waiting), len(self._running)
        self._observer.round(self._session, waiting=waiting, running=taken)

    def _decode(self) -> None:
        """Tokens of all rows that go on; one while a prompt is read."""
        if self._filling:
            self._session.decode(1)
            return
        steps = self._pace.steps
        seconds = self._session.decode(steps)
        whole = steps == 1 or bool(self._session.running)
        self._pace.took(steps, seconds, whole=whole)

    def _gone(self, job: Job, now: float) -> str | None:
        """Why a job must end now, or None."""
        if job.cancelled or job.dismissed:
            return "cancelled"
        if self._abort:
            return "aborted"
        late = job.deadline is not None and now > job.deadline
        return "timeout" if late else None

    def _drop(self) -> None:
        """Ends the jobs that nobody waits for, or whose time is up."""
        now = time.monotonic()
        with self._wake:
            gone = [
                (job, why) for job in self._waiting if (why := self._gone(job, now))
            ]
            for job, _ in gone:
                self._waiting.remove(job)
        for job, why in gone:
            self._end(job, why)
        for job in list(self._running.values()):
            if why := self._gone(job, now):
                self._leave(job, why)

    def _admit(self) -> None:
        """Gives free rows to those who wait."""
        while self._session.free:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                row = self._session.join(
                    job.prompt,
                    job.config,
                    logprobs=job.logprobs,
                    score_prompt=job.score_prompt,
                )
            except ConfigError as error:
                self._end(job, "failed", message=str(error))
                continue
            job.row, job.filling = row, True
            with self._wake:
                self._running[row] = job
            self._filling.append(row)
            job.times["joined"] = time.monotonic()

    def _prefill(self) -> bool:
        """Runs a piece of the next prompt; returns whether it was its last."""
        if not self._filling:
            return False
        row = self._filling.popleft()
        last = self._session.prefill(row)
        self._running[row].cached = self._session.cached_tokens(row)
        if last:
            self._running[row].filling = False
        else:
            self._filling.append(row)
        return last

    def _deliver(self) -> None:
        """Hands out new tokens, and lets the rows leave that have ended."""
        now = time.monotonic()
        events: dict[int, list[StreamEvent]] = {}
        for event in self._session.take_events():
            events.setdefault(event.index, []).append(event)
        for row, found in events.items():
            job = self._running[row]
            new = sum(event.token >= 0 for event in found)
            self._observer.tokens(job, new, now)
            job.times.setdefault("first", now)
            job.times["last"] = now
            job.count += new
            self._hand_over(job, found)
        going = set(self._session.running)
        for row, job in list(self._running.items()):
            if row not in going and not job.filling:
                self._leave(job, None)

    def _leave(self, job: Job, why: str | None) -> None:
        """Frees a job's row; `why` is None for a job that has ended by itself."""
        row = job.row
        assert row is not None
        logs = list(self._session.prompt_logprobs(row))
        output = self._session.leave(row)
        with self._wake:
            del self._running[row]
        if job.filling:
            self._filling.remove(row)
        job.row = None
        self._end(job, why or output.finish_reason, output, logs)

    def _end(
        self,
        job: Job,
        reason: str,
        output: RowOutput | None = None,
        logs: list[TokenLogprobs] | None = None,
        message: str = "",
    ) -> None:
        job.ended = True
        job.times["ended"] = time.monotonic()
        output = output or RowOutput([], "", reason)
        self._observer.ended(job, reason)
        self._hand_over(job, Ended(output, reason, logs or [], job.cached, message))

    def _hand_over(self, job: Job, what: Delivery) -> None:
        if job.cancelled:
            return
        with contextlib.suppress(RuntimeError):  # its event loop has been closed
            job.deliver(what)
