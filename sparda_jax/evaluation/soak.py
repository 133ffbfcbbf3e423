"""Random requests in offload mode for as long as asked: does anything drift or grow?

Every request is drawn from (seed, its number) alone: rows, lengths, budget, sampling,
stops, a cancellation, a further turn. Every n-th is run once more on a resident cache,
whose tokens must be the same. The first requests (`warm_up`) meet every size, so that
none of those after them may compile anything, and what lives on the device and on the
host afterwards must stay what it was.
"""

import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from sparda_jax.engine.api import generate, stream
from sparda_jax.engine.compile_cache import PROGRAMS
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.model import LanguageModel
from sparda_jax.inference.shapes import capacity_blocks

# Cut, with its further turn, as often as whole: these are what users do.
_KINDS = ("whole", "stop", "cancel", "turns")
_CALL = 2  # Tokens of one call of a stream.
_TURN = 48  # Most tokens of a further turn.
# A process's memory rests after some requests: allocators keep what they are given.
_RSS_SLACK = 96 * 2**20
_LEAST_FOR_RSS = 48

Tokens = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Requests that share programs.

    Attributes:
      rows: Sequences.
      longest: Most tokens of a prompt; the longest has more than three quarters.
      new: Output tokens.
      budget: Blocks of a list.
    """

    rows: int
    longest: int
    new: int
    budget: int


@dataclasses.dataclass(frozen=True)
class SoakRequest:
    """One request.

    Attributes:
      number: Its place in the run.
      kind: "whole", "stop" (run twice: the second time every row ends where it put
        out a token of the first), "cancel" (a stream that is cancelled) or "turns" (a
        stream that is cancelled, and a further turn).
      size: Which programs it shares.
      prompts: Token ids of each row.
      seed, temperature: Of sampling.
      stop_at: Output token of each row that shall end it, for "stop".
      events: Events that are taken before a stream is cancelled.
      further: Prompts of the further turn.
    """

    number: int
    kind: str
    size: Size
    prompts: Tokens
    seed: int
    temperature: float
    stop_at: int = 0
    events: int = 0
    further: Tokens = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SoakReport:
    """What a run did, and what was wrong; figures of memory are bytes.

    Attributes:
      requests, tokens, checked: Requests after the warm-up, their output tokens, and
        how many were compared with a resident cache.
      warm_up: Requests that came before.
      kinds: How many of each kind.
      compiled: Programs compiled after the warm-up.
      live_bytes: Of all JAX arrays, after the warm-up and at the end.
      rss_bytes: Of the process, likewise; None where the system does not say.
      seconds: After the warm-up.
      problems: One line each; empty if all held.
    """

    requests: int = 0
    tokens: int = 0
    checked: int = 0
    warm_up: int = 0
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    compiled: int = 0
    live_bytes: tuple[int, int] = (0, 0)
    rss_bytes: tuple[int, int] | None = None
    seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


def sizes_of(lm: LanguageModel, context: int, new: int) -> list[Size]:
    """The sizes of a run: one long prompt, or three short ones at a smaller budget.

    Two are few: each takes a dozen programs, and a real model's take long to compile.
    """
    base, forced = lm.sparse.largest_budget, lm.sparse.forced_blocks
    smaller = max(forced + 1, base * 3 // 4)
    return [Size(1, context, new, base), Size(3, max(16, context // 4), new, smaller)]


def draw(
    number: int, seed: int, sizes: list[Size], vocab: int, *, extreme: str = ""
) -> SoakRequest:
    """The request of a number.

    Args:
      number: Its place in the run.
      seed: Of the run.
      sizes: Those to draw from.
      vocab: Token ids are below it.
      extreme: "least" or "most" takes the end of every range, as the warm-up wants.
    """
    rng = np.random.default_rng([seed, number])

    def between(least: int, most: int) -> int:
        drawn = int(rng.integers(least, most + 1))
        return {"least": least, "most": most}.get(extreme, drawn)

    def ids(count: int) -> list[int]:
        return rng.integers(0, vocab, count).tolist()

    kind = _KINDS[int(rng.integers(len(_KINDS)))]
    size = sizes[int(rng.integers(len(sizes)))]
    if extreme:
        kind, size = "turns", sizes[number // 2 % len(sizes)]
    longest = between(size.longest * 3 // 4 + 1, size.longest)
    if kind == "turns":
        # What the first turn takes room for decides the sizes of the second.
        longest = size.longest
    lengths = [longest, *(between(1, longest) for _ in range(size.rows - 1))]
    rng.shuffle(lengths)
    return SoakRequest(
        number=number,
        kind=kind,
        size=size,
        prompts=[ids(length) for length in lengths],
        seed=int(rng.integers(2**31)),
        temperature=float(rng.choice([0.0, 0.8])),
        stop_at=between(0, size.new - 1),
        events=between(1, max(1, size.rows * (size.new - 1))),
        further=[ids(between(1, _TURN)) for _ in range(size.rows)],
    )


def run_request(lm: LanguageModel, request: SoakRequest) -> Tokens:
    """Runs a request; returns the output tokens of every row, of both turns."""
    sparse = dataclasses.replace(lm.sparse, block_budget=request.size.budget)
    lm = dataclasses.replace(lm, sparse=sparse)
    how = {
        "max_new_tokens": request.size.new,
        "temperature": request.temperature,
        "seed": request.seed,
        "ignore_eos": True,
    }
    if request.kind in ("whole", "stop"):
        tokens = generate(lm, request.prompts, **how).tokens
        if request.kind == "whole":
            return tokens
        ends = [row[request.stop_at] for row in tokens]
        return generate(lm, request.prompts, stop_ids=ends, **how).tokens
    events = stream(lm, request.prompts, tokens_per_call=_CALL, **how)
    for _ in itertools.islice(events, request.events):
        pass
    out = events.cancel()
    if request.kind == "cancel":
        return out.tokens
    held: Conversation = out.conversation
    more = generate(lm, request.further, conversation=held, **how)
    return [*out.tokens, *more.tokens]


def soak(
    offload: LanguageModel,
    resident: LanguageModel,
    sizes: list[Size],
    *,
    seed: int,
    seconds: float,
    requests: int | None = None,
    tokens: int | None = None,
    only: int | None = None,
    check_every: int = 5,
    run: Callable[[LanguageModel, SoakRequest], Tokens] = run_request,
    on_request: Callable[[SoakReport], None] | None = None,
) -> SoakReport:
    """Runs random requests until the time, or the number of them, is over.

    Args:
      offload, resident: The same model with its KV in host memory, and on the device.
      sizes: What is asked for.
      seed: Of all requests.
      seconds: How long to go on after the warm-up.
      requests: Most requests after the warm-up; None for any number.
      tokens: Output tokens after the warm-up that are enough; None for any number.
      only: Run the request of this number alone, checked, without a warm-up.
      check_every: Compare every n-th with the resident cache.
      run: Runs one request.
      on_request: Is called after each.

    Returns:
      What was done and what was wrong; the run ends at the first difference of tokens.
    """
    report = SoakReport()
    vocab = offload.config.vocab_size
    if only is not None:
        request = draw(only, seed, sizes, vocab)
        output = run(offload, request)
        _take(report, request, output)
        _compare(report, request, output, run(resident, request))
        return report
    for request in _warm_up(seed, sizes, vocab, offload.sparse.block_size):
        for lm in (offload, resident):
            run(lm, request)
        report.warm_up += 1
    programs, live, rss = PROGRAMS.compiled, _live_bytes(), _rss()
    begun = time.monotonic()
    highest = rss
    for number in itertools.count():
        if time.monotonic() - begun >= seconds or number == requests:
            break
        if tokens is not None and report.tokens >= tokens:
            break
        request = draw(number, seed, sizes, vocab)
        output = run(offload, request)
        _take(report, request, output)
        if number % check_every == 0:
            _compare(report, request, output, run(resident, request))
        if number == _LEAST_FOR_RSS // 2:
            rss = _rss()  # The allocators have settled.
        highest = _rss()
        report.seconds = time.monotonic() - begun
        report.compiled = PROGRAMS.compiled - programs
        report.live_bytes = (live, _live_bytes(live))
        report.rss_bytes = None if rss is None or highest is None else (rss, highest)
        if on_request is not None:
            on_request(report)
        if report.problems:
            break
        _look_at_growth(report, number)
        if report.problems:
            break
    return report


def _warm_up(
    seed: int, sizes: list[Size], vocab: int, block_size: int
) -> Iterator[SoakRequest]:
    """Requests that meet every program: both ends of every size, of all kinds."""
    for index, size in enumerate(sizes):
        for end, extreme in enumerate(("least", "most")):
            request = draw(2 * index + end, seed, sizes, vocab, extreme=extreme)
            yield request
            # One turn alone: its longest row may be shorter.
            length = size.longest * 3 // 4 + 1 if extreme == "least" else size.longest
            prompts = [row[:length] for row in request.prompts]
            yield dataclasses.replace(request, kind="whole", prompts=prompts)
            if extreme == "least":
                yield from _between(request, block_size)


def _between(request: SoakRequest, block_size: int) -> Iterator[SoakRequest]:
    """Further turns in caches larger than the least one, and smaller than the largest.

    Behind a long first turn there are some: how much of it there was decides.
    """
    size = request.size

    def room(tokens: int) -> int:
        blocks = -(-(size.longest + tokens + size.new) // block_size)
        return capacity_blocks(blocks)

    ends = {room(2), room(size.new + _TURN)}
    for blocks, taken in itertools.groupby(range(1, size.new), lambda n: room(n + 1)):
        if blocks not in ends:
            # Not at an end of them: calls take several tokens at a time.
            middle = list(taken)
            yield dataclasses.replace(
                request, events=middle[len(middle) // 2] * size.rows
            )


def _take(report: SoakReport, request: SoakRequest, tokens: Tokens) -> None:
    report.requests += 1
    report.tokens += sum(map(len, tokens))
    report.kinds[request.kind] = report.kinds.get(request.kind, 0) + 1


def _compare(
    report: SoakReport, request: SoakRequest, tokens: Tokens, expected: Tokens
) -> None:
    """Notes the first row whose tokens are not those of the resident cache."""
    report.checked += 1
    for row, (got, want) in enumerate(zip(tokens, expected, strict=True)):
        if got == want:
            continue
        place = next(
            (
                i
                for i, pair in enumerate(zip(got, want, strict=False))
                if len({*pair}) > 1
            ),
            min(len(got), len(want)),
        )
        report.problems.append(
            f"request {request.number} ({request.kind}, {request.size.rows} rows) "
            f"differs from a resident cache in row {row} at token {place}"
        )
        return


def _look_at_growth(report: SoakReport, number: int) -> None:
    """Notes programs that were compiled, and memory that grew."""
    if report.compiled:
        report.problems.append(
            f"request {number} compiled {report.compiled} programs after the warm-up"
        )
    before, now = report.live_bytes
    if now > before:
        report.problems.append(
            f"request {number} left {now - before} bytes of arrays behind"
        )
    if report.rss_bytes is not None and number >= _LEAST_FOR_RSS:
        settled, latest = report.rss_bytes
        if latest > settled * 1.1 + _RSS_SLACK:
            report.problems.append(
                f"the process grew from {settled} to {latest} bytes by request {number}"
            )


def _live_bytes(before: int = -1) -> int:
    """Bytes of all arrays that anything refers to, on devices and in host memory.

    Garbage is collected only where there are more than before: it takes long.
    """
    found = sum(array.nbytes for array in jax.live_arrays())
    if found > before:
        gc.collect()
        found = sum(array.nbytes for array in jax.live_arrays())
    return found


def _rss() -> int | None:
    """Bytes of this process in memory, where the system says them (Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
