"""Who runs when; random requests, with sockets and without."""

import json
import math
import pathlib
import threading
import types

import numpy as np
import pytest
from patience import PATIENCE
from serving_client import KEY, MALFORMED, connect, post

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


def test_who_is_cancelled_has_left_before_the_next_call(server):
    """However many steps that call has; its neighbour, alone now, gets all of its."""
    server.settle()
    session = server.serving.session
    scheduler = Scheduler(session, Observer(), max_waiting=4, decode_steps=4)
    clients = [_Client([5 + i], _config(60)) for i in range(2)]
    scheduler.submit([client.job for client in clients])
    while len(clients[1].tokens) < 5:
        scheduler.round()
    seen = len(clients[0].tokens)
    scheduler.end([clients[0].job])
    scheduler.round()
    assert clients[0].ended.reason == "cancelled" and len(session.free) == 2
    assert len(clients[0].ended.output.tokens) == seen
    while not clients[1].done.is_set():
        scheduler.round()
    assert len(clients[1].tokens) == 60 and scheduler.idle
    assert clients[1].tokens == clients[1].ended.output.tokens


@pytest.mark.parametrize("new", [14, 18])
def test_calls_of_one_step_are_those_beside_a_prompt(server, monkeypatch, new):
    """Who ends first shortens no call; what is left of an answer is the last one's."""
    server.settle()
    session = server.serving.session
    scheduler = Scheduler(session, Observer(), max_waiting=4, decode_steps=4)
    pace = types.SimpleNamespace(steps=4, took=lambda *_, **__: None)
    monkeypatch.setattr(scheduler, "_pace", pace)
    calls, decode = [], session.decode

    def counted(steps: int) -> float:
        calls.append(steps)
        return decode(steps)

    monkeypatch.setattr(session, "decode", counted)
    clients = [_Client([5 + i], _config(new - i)) for i in range(3)]
    scheduler.submit([client.job for client in clients])
    while not all(client.done.is_set() for client in clients):
        scheduler.round()
    # Beside the prompts behind its own the first row got two tokens, the second one:
    # each has new - 3 to come.
    assert calls == [1, 1, *[4] * math.ceil((new - 3) / 4)]
    for i, client in enumerate(clients):
        alone = _alone(server.lm, [5 + i], _config(new - i))
        assert client.tokens == alone[0]


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
    assert client.done.wait(PATIENCE)
    return client.tokens, client.ended.prompt_logs, logs


def _body(prompt: list[int], config: sj.GenerateConfig) -> dict:
    """The body of /v1/completions that asks for that."""
    return {
        "prompt": prompt,
        "max_tokens": config.max_new_tokens,
        "min_tokens": config.min_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "seed": config.seed,
        "ignore_eos": config.ignore_eos,
        "stop": list(config.stop),
        "include_stop_str_in_output": config.include_stop,
    }


def _alone(lm: sj.LanguageModel, prompt: list[int], config: sj.GenerateConfig) -> tuple:
    """Tokens, text and reason of `generate`; not its conversation, which holds KV."""
    given = sj.generate(lm, [prompt], config)
    return given.tokens[0], given.texts[0], given.finish_reasons[0]


def _threads() -> list[str]:
    """Names of the threads, but for the event loop's pool, which has a bound."""
    names = (thread.name for thread in threading.enumerate())
    pools = ("asyncio_", "uvloop_")
    return sorted(name for name in names if not name.startswith(pools))


def _hang_up(server, body: dict, seconds: float) -> None:
    """Asks for a stream, and closes the socket in the middle of it."""
    headers = {"Authorization": f"Bearer {KEY}"}
    connection = connect(server)
    data = json.dumps({**body, "stream": True})
    connection.request("POST", "/v1/completions", data, headers)
    threading.Event().wait(seconds)
    connection.close()


def _fuzz(server, count: int, seed: int, distinct: int) -> None:
    """Random requests from several threads, some of which lose patience.

    A third comes through sockets, with as many malformed bodies beside. Every tenth
    asks the same: its log-probabilities stay as they were, to the last bit.
    """
    server.settle()
    scheduler = server.serving.scheduler
    watched = [[*range(3, 100)] * size for size in (1, 4)]
    first = [_scores(scheduler, prompt) for prompt in watched]
    kinds = _random_requests(distinct, seed)
    alone = [_alone(server.lm, prompt, config) for prompt, config in kinds]
    before, threads = PROGRAMS.compiled, _threads()
    problems: list[str] = []

    def by_socket(random: np.random.Generator, which: int, patience: float) -> None:
        body, status = MALFORMED[int(random.integers(len(MALFORMED)))]
        answer = post(server, "/v1/completions", body)
        if answer[0] != status:
            problems.append(f"{body[:60]!r}: {answer}")
        asked = _body(*kinds[which])
        if patience:
            _hang_up(server, asked, patience)
            return
        status, answer = post(server, "/v1/completions", asked)
        found = status, answer.get("choices", [{}])[0].get("text")
        if found != (200, alone[which][1]):
            problems.append(f"request {which}: {answer}")

    def user(number: int) -> None:
        random = np.random.default_rng((seed, number))
        for index in range(count // 6):
            if index % 10 == 9:
                place = index // 10 % 2
                if _scores(scheduler, watched[place]) != first[place]:
                    problems.append(f"user {number}: watched {place} at {index}")
            which = int(random.integers(distinct))
            patience = random.random() * 0.05 if random.random() < 0.2 else 0.0
            if index % 3 == 0:
                by_socket(random, which, patience)
                continue
            client = _Client(*kinds[which])
            scheduler.submit([client.job])
            if patience:
                client.done.wait(patience)
                scheduler.cancel([client.job])
                continue
            assert client.done.wait(PATIENCE)
            found = (client.tokens, client.text, client.ended.reason)
            if found != alone[which]:
                problems.append(f"request {which}: {found} is not {alone[which]}")

    users = [threading.Thread(target=user, args=(number,)) for number in range(6)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    server.settle()
    assert problems == []
    assert PROGRAMS.compiled == before
    assert _threads() == threads
    assert server.serving.session.free == [0, 1, 2]
    assert server.serving.session.held_tokens() == [0, 0, 0]


@pytest.mark.slow
def test_random_requests_get_what_generate_gives(server):
    _fuzz(server, count=200, seed=1, distinct=24)


def _held_bytes() -> int:
    """Memory of the process that is not on disk."""
    pages = pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * 4096


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_ten_thousand_random_requests(server):
    """What the process holds does not grow either, once a tenth of them has come."""
    _fuzz(server, count=1_000, seed=2, distinct=100)
    held = _held_bytes()
    _fuzz(server, count=9_000, seed=3, distinct=300)
    grown = _held_bytes() - held
    print(f"held {held / 2**20:.0f} MiB after 1,000, and {grown / 2**20:.1f} more now")
    assert grown < 64 * 2**20  # 7 KiB a request
