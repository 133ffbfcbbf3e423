"""Who runs when, without sockets."""

import threading

import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.serving.jobs import Ended, Job, Refused
from sparda_jax.serving.observer import Observer
from sparda_jax.serving.scheduler import Scheduler


class _Client:
    """Waits for what a job delivers."""

    def __init__(self, prompt, config, **more):
        self.tokens, self.text, self.ended = [], "", None
        self.done = threading.Event()
        self.job = Job("id", prompt, config, self._take, **more)

    def _take(self, what):
        if isinstance(what, Ended):
            self.ended = what
            self.done.set()
            return
        self.tokens += [event.token for event in what if event.token >= 0]
        self.text += "".join(event.text for event in what)


@pytest.fixture
def scheduler(server):
    """A further one, by hand, on the rows of the server that now has nothing to do."""
    server.settle()
    return Scheduler(server.serving.session, Observer(), max_waiting=4, decode_steps=1)


def _config(new: int, **more) -> sj.GenerateConfig:
    return sj.GenerateConfig(max_new_tokens=new, ignore_eos=True, **more)


def test_a_long_prompt_lets_others_go_on(scheduler):
    """A piece of it a round, and a token of theirs in the same round."""
    short = _Client([5, 6], _config(30))
    scheduler.submit([short.job])
    scheduler.round()
    assert len(short.tokens) == 2  # that of the prefill and that of the step
    long = _Client([7] * 500, _config(4))
    scheduler.submit([long.job])
    for rounds in range(1, 5):  # pieces of 128
        scheduler.round()
        assert len(short.tokens) == 2 + rounds
        assert bool(long.tokens) == (rounds == 4)
    while not (short.done.is_set() and long.done.is_set()):
        scheduler.round()
    assert short.ended.reason == "length" and len(short.tokens) == 30
    assert scheduler.idle


def test_first_come_first_served_and_no_more_than_may_wait(scheduler):
    clients = [_Client([5 + i], _config(3)) for i in range(7)]
    scheduler.submit([client.job for client in clients])
    with pytest.raises(Refused, match="7 outputs wait already"):
        scheduler.submit([_Client([5], _config(1)).job])
    scheduler.round()
    assert [job for _, job in scheduler.rows()] == [c.job for c in clients[:3]]
    ended = []
    while len(ended) < 7:
        scheduler.round()
        ended += [c for c in clients if c.done.is_set() and c not in ended]
    assert ended == clients


def test_who_is_cancelled_leaves_within_one_round(scheduler):
    running, waiting = (_Client([5] * 300, _config(60)) for _ in range(2))
    late = _Client([5], _config(60), deadline=0.0)
    scheduler.submit([running.job, waiting.job, late.job])
    scheduler.cancel([waiting.job])
    scheduler.round()
    assert late.ended.reason == "timeout"
    assert [job for _, job in scheduler.rows()] == [running.job]
    scheduler.end([running.job])
    scheduler.round()
    assert running.ended.reason == "cancelled" and scheduler.idle
    assert not waiting.done.is_set()  # nobody waits for it
    going = _Client([5], _config(60))
    scheduler.submit([going.job])
    scheduler.round()
    scheduler.drain(abort=True)
    with pytest.raises(Refused, match="stopping"):
        scheduler.submit([_Client([5], _config(1)).job])
    scheduler.round()
    assert going.ended.reason == "aborted" and len(going.ended.output.tokens) == 2


def test_who_is_cancelled_gets_two_more_steps_at_most(server):
    """The one that ran, and the one that had begun behind it."""
    server.settle()
    session = server.serving.session
    scheduler = Scheduler(session, Observer(), max_waiting=4, decode_steps=16)
    scheduler._step = 1e6  # steps are long, however fast this machine is
    clients = [_Client([5 + i], _config(60)) for i in range(2)]
    scheduler.submit([client.job for client in clients])
    while len(clients[1].tokens) < 5:
        scheduler.round()
    seen = len(clients[0].tokens)
    scheduler.end([clients[0].job])
    scheduler.round()
    assert clients[0].ended.reason == "cancelled" and len(session.free) == 2
    assert seen <= len(clients[0].ended.output.tokens) <= seen + 2
    while not clients[1].done.is_set():
        scheduler.round()
    assert len(clients[1].tokens) == 60 and scheduler.idle
    assert clients[1].tokens[: len(clients[1].ended.output.tokens)] == (
        clients[1].ended.output.tokens
    )


class _Timed:
    """Two rows whose steps take a given time, and prompts of three pieces."""

    rows = 2

    def __init__(self, seconds):
        self.seconds, self.steps, self.free, self.running = seconds, [], [0, 1], []
        self.can_step_ahead, self.now = True, 0.0
        self._left = {}

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def join(self, prompt, config, **_):
        row = self.free.pop(0)
        self._left[row] = 3
        return row

    def prefill(self, row):
        self._left[row] -= 1
        if not self._left[row]:
            self.running.append(row)
        return not self._left[row]

    def cached_tokens(self, row):
        return 0

    def take_events(self):
        return ()

    def decode(self, steps):
        self.steps.append(steps)
        self.now += self.seconds * steps
        return self.seconds * steps

    def step_ahead(self):
        self.steps.append("ahead")
        self.now += self.seconds


@pytest.mark.usefixtures("without_type_checks")
def test_long_steps_begin_ahead_and_short_ones_share_a_call(monkeypatch):
    """And one while a prompt is read, which waits for no more between its pieces."""
    session = _Timed(0.0095)
    monkeypatch.setattr("sparda_jax.serving.scheduler.time", session)
    scheduler = Scheduler(session, Observer(), max_waiting=4, decode_steps=16)

    def rounds(count):
        session.steps.clear()
        for _ in range(count):
            scheduler.round()
        return session.steps

    scheduler.submit([_Client([5], _config(100)).job])
    assert rounds(3 + 3) == [1, 10, 10, 10]
    scheduler.submit([_Client([5], _config(100)).job])
    assert rounds(4) == [1, 1, 10, 10]
    session.seconds = 0.08  # longer contexts
    assert rounds(4) == [10, "ahead", "ahead", "ahead"]
    session.can_step_ahead = False  # stop strings
    assert rounds(3) == [1, 1, 1]
    session.can_step_ahead, session.seconds = True, 0.0001
    # One look of a step that had ended long before is not believed at once.
    assert rounds(6) == ["ahead", "ahead", 2, 5, 10, 16]
    session.seconds = 0.3
    assert rounds(3) == [16, "ahead", "ahead"]
    strict = Scheduler(_Timed(0.3), Observer(), max_waiting=4, decode_steps=1)
    session = strict._session
    strict.submit([_Client([5], _config(100)).job])
    for _ in range(5):
        strict.round()
    assert session.steps == [1, 1, 1]


def test_what_a_step_ahead_shows_is_the_step_before(server):
    """Rows that end, leave and come between two steps get what one alone is given."""
    server.settle()
    session = server.serving.session
    prompts = [[5], [6, 7], [8, 9, 10]]
    given: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def take():
        for event in session.take_events():
            given[event.index].append(event.token)

    def begin(index, new):
        row = session.join(prompts[index], _config(new))
        assert session.prefill(row)
        return row

    alone = []
    for index in range(3):
        row = begin(index, 9)
        session.decode(9)
        alone.append(session.leave(row).tokens)
    rows = [begin(0, 4), begin(1, 9)]
    assert rows == [0, 1] and session.can_step_ahead
    take()
    session.step_ahead()
    take()
    assert [len(given[row]) for row in (0, 1)] == [2, 2]  # and a third has begun
    session.step_ahead()
    take()
    assert [len(given[row]) for row in (0, 1)] == [3, 3]
    assert session.running == [0, 1]
    session.step_ahead()
    assert session.running == [1]
    take()
    assert session.leave(0).tokens == alone[0][:4] == given[0]
    given[0] = []
    assert begin(2, 9) == 0
    while session.running:
        session.step_ahead()
        take()
    assert given[0] == alone[2] and given[1] == alone[1]
    for row in (0, 1):
        assert session.leave(row).finish_reason == "length"
    assert begin(0, 3) == 0  # the step that has begun is its last
    session.step_ahead()
    assert session.running == [0]
    session.decode(4)
    assert session.running == [] and session.leave(0).tokens == alone[0][:3]
    row = session.join([5], _config(4, stop=("e",)))
    assert not session.can_step_ahead
    session.leave(row)


def _random_requests(
    count: int, seed: int
) -> list[tuple[list[int], sj.GenerateConfig]]:
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        new = int(random.integers(1, 24))
        prompt = random.integers(3, 120, int(random.choice([1, 5, 60, 200]))).tolist()
        if random.random() < 0.3:  # a shared beginning
            prompt = [*range(3, 120), *range(3, 90), *prompt][:600]
        config = sj.GenerateConfig(
            max_new_tokens=new,
            min_new_tokens=int(random.integers(0, new + 1)),
            temperature=float(random.choice([0.0, 0.7, 1.5])),
            top_k=int(random.choice([0, 12])),
            top_p=float(random.choice([1.0, 0.9])),
            repetition_penalty=float(random.choice([1.0, 1.3])),
            seed=index,
            ignore_eos=bool(index % 2),
            stop=("e", "op") if index % 4 == 0 else (),
            include_stop=bool(index % 8),
        )
        found.append((prompt, config))
    return found


def _scores(scheduler: Scheduler, prompt: list[int]) -> tuple:
    """Tokens of an answer, and the log-probabilities of prompt and answer."""
    logs: list = []
    client = _Client(prompt, _config(6), logprobs=True, score_prompt=True)
    take = client.job.deliver

    def keep(what) -> None:
        if not isinstance(what, Ended):
            logs.extend(event.logs for event in what)
        take(what)

    client.job.deliver = keep
    scheduler.submit([client.job])
    assert client.done.wait(300)
    return client.tokens, client.ended.prompt_logs, logs


def _fuzz(server, count: int, seed: int, distinct: int) -> None:
    """Random requests from several threads, some of which lose patience.

    Every tenth asks the same: its log-probabilities stay as they were, to the last bit.
    """
    server.settle()
    scheduler = server.serving.scheduler
    watched = [[*range(3, 100)] * size for size in (1, 4)]
    first = [_scores(scheduler, prompt) for prompt in watched]
    kinds = _random_requests(distinct, seed)
    alone = [sj.generate(server.lm, [prompt], config) for prompt, config in kinds]
    before, threads = PROGRAMS.compiled, threading.active_count()
    problems: list[str] = []

    def user(number: int) -> None:
        random = np.random.default_rng((seed, number))
        for index in range(count // 6):
            if index % 10 == 9:
                place = index // 10 % 2
                if _scores(scheduler, watched[place]) != first[place]:
                    problems.append(f"user {number}: watched {place} at {index}")
            which = int(random.integers(distinct))
            client = _Client(*kinds[which])
            scheduler.submit([client.job])
            if random.random() < 0.2:
                client.done.wait(float(random.random()) * 0.05)
                scheduler.cancel([client.job])
                continue
            assert client.done.wait(300)
            expected = alone[which]
            found = (client.tokens, client.text, client.ended.reason)
            wanted = (expected.tokens[0], expected.texts[0], expected.finish_reasons[0])
            if found != wanted:
                problems.append(f"request {which}: {found} is not {wanted}")

    users = [threading.Thread(target=user, args=(number,)) for number in range(6)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    server.settle()
    assert problems == []
    assert PROGRAMS.compiled == before
    assert threading.active_count() == threads
    assert server.serving.session.free == [0, 1, 2]
    assert server.serving.session.held_tokens() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("most_seconds", [0.1, 1e-9], ids=["together", "ahead"])
def test_random_requests_get_what_generate_gives(server, monkeypatch, most_seconds):
    monkeypatch.setattr("sparda_jax.serving.scheduler._MOST_SECONDS", most_seconds)
    _fuzz(server, count=150, seed=1, distinct=24)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_random_requests(server):
    _fuzz(server, count=10_000, seed=2, distinct=300)
