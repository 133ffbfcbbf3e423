"""What requests against a server got: `sparda bench serve`'s figures."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_SHOWN = (50, 90, 99)
# Seconds between two tokens of one call at most.
_TOGETHER = 0.003


@dataclasses.dataclass
class Result:
    """What one request has got.

    Attributes:
      begun: When it was sent.
      times: When each token came.
      ended: When the answer was whole; infinite for one that never was.
      tokens: Output tokens, as the server counts them.
      cached: Prompt tokens that it says it did not run again.
      failure: What went wrong, or None.
      cancelled: The client has gone by itself.
      fixed: It is one of those that all ask the same.
      text: Of the answer.
      logprobs: Of its tokens, if they were asked for.
    """

    begun: float
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float = math.inf
    tokens: int = 0
    cached: int = 0
    failure: str | None = None
    cancelled: bool = False
    fixed: bool = False
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Percentiles by rank, as JSON has them: None where that many never came."""
    ranked = sorted(values)
    found: dict[str, float | None] = {}
    for share in _MOST_SHOWN:
        if not ranked:
            found[f"p{share}"] = None
            continue
        value = ranked[min(math.ceil(share / 100 * len(ranked)), len(ranked)) - 1]
        found[f"p{share}"] = round(value, 5) if math.isfinite(value) else None
    return found


def full_batch_rate(results: Sequence[Result], rows: int) -> float | None:
    """Tokens a second while as many answers came as the server has rows.

    None if that never was. Nobody's prompt is read then: it is what is left of the
    engine's decode rate. Tokens of one call come together: they count as given evenly
    since the call before. A row has part in it from the end of its first call on: the
    call before that one lies behind a piece of its prompt for all others.

    Args:
      results: Of requests that were answered.
      rows: Of the server.
    """
    answers = [result.times for result in results if len(result.times) > 1]
    given = [_calls(times) for times in answers]
    edges = [(ends[1], 1) for ends, _ in given]
    edges += [(times[-1], -1) for times in answers]
    running, begun, seconds, tokens = 0, 0.0, 0.0, 0.0
    for at, change in sorted(edges):
        if running < rows <= running + change:
            begun = at
        if running + change < rows <= running:
            seconds += at - begun
            tokens += sum(np.diff(np.interp((begun, at), *one))[0] for one in given)
        running += change
    return round(float(tokens) / seconds, 3) if seconds else None


def _calls(times: Sequence[float]) -> tuple[list[float], list[int]]:
    """When an answer's calls were over, and the tokens that it had then."""
    ends, counts = [times[0]], [1]
    for before, (count, at) in zip(times, enumerate(times[1:], 2), strict=False):
        if at - before < _TOGETHER and len(ends) > 1:
            ends[-1], counts[-1] = at, count
        else:
            ends.append(at)
            counts.append(count)
    return ends, counts


def steadiness(results: Sequence[Result]) -> dict[str, Any] | None:
    """Whether those that asked the same were answered the same, whatever came between.

    Args:
      results: Of all requests; those that are not `fixed` are left out.

    Returns:
      Answers, how many of them have another text than the first, the largest
      difference of a token's log-probability, and the first one's text; None without
      such requests.
    """
    answers = [one for one in results if one.fixed and one.failure is None]
    if not answers:
        return None
    first = answers[0]
    changed, largest = 0, 0.0
    for one in answers[1:]:
        same = one.text == first.text and len(one.logprobs) == len(first.logprobs)
        changed += not same
        if same:
            pairs = zip(one.logprobs, first.logprobs, strict=True)
            largest = max([largest, *(abs(a - b) for a, b in pairs)])
    return {
        "answers": len(answers),
        "changed": changed,
        "largest_difference": largest,
        "text": first.text,
    }


def figures(results: Sequence[Result], seconds: float, rows: int) -> dict[str, Any]:
    """What the requests got.

    Args:
      results: Of all requests but the warm-up's.
      seconds: From the first request to the last answer.
      rows: Of the server.
    """
    stayed = [result for result in results if not result.cancelled]
    good = [result for result in stayed if result.failure is None]
    firsts = [
        result.times[0] - result.begun
        if result.failure is None and result.times
        else math.inf
        for result in stayed
    ]
    gaps = [
        (result.times[-1] - result.times[0]) / (len(result.times) - 1)
        for result in good
        if len(result.times) > 1
    ]
    gaps += [math.inf] * (len(stayed) - len(good))
    pauses = [
        max(b - a for a, b in itertools.pairwise(result.times))
        for result in good
        if len(result.times) > 1
    ]
    pauses += [math.inf] * (len(stayed) - len(good))
    wholes = [
        result.ended - result.begun if result.failure is None else math.inf
        for result in stayed
    ]
    tokens = sum(result.tokens or len(result.times) for result in results)
    return {
        "requests": len(results),
        "completed": len(good),
        "failed": len(stayed) - len(good),
        "cancelled": len(results) - len(stayed),
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_second": round(tokens / seconds, 3),
        "full_batch_tokens_per_second": full_batch_rate(good, rows),
        "requests_per_second": round(len(good) / seconds, 4),
        "cached_tokens": sum(result.cached for result in results),
        "first_token_seconds": percentiles(firsts),
        "between_tokens_seconds": percentiles(gaps),
        "longest_pause_seconds": percentiles(pauses),
        "whole_seconds": percentiles(wholes),
        "same_question": steadiness(results),
        "failures": sorted({str(r.failure)[:200] for r in stayed if r.failure})[:5],
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people; a dash is an answer that never came."""
    lines = [
        f"requests   {found['completed']} completed, {found['failed']} failed, "
        f"{found['cancelled']} cancelled in {found['seconds']:.1f} s",
        f"output     {found['output_tokens_per_second']:.1f} tokens/s, "
        f"{found['requests_per_second']:.2f} requests/s",
        f"reused     {found['cached_tokens']} prompt tokens",
        "seconds            " + "".join(f"{'p' + str(p):>9}" for p in _MOST_SHOWN),
    ]
    for name, label in (
        ("first_token_seconds", "first token"),
        ("between_tokens_seconds", "between tokens"),
        ("longest_pause_seconds", "longest pause"),
        ("whole_seconds", "whole answer"),
    ):
        values = (found[name][f"p{p}"] for p in _MOST_SHOWN)
        cells = ("–" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"  {label:<17}" + "".join(f"{cell:>9}" for cell in cells))
    if found["same_question"] is not None:
        lines.append(
            "same question  {answers} answers, {changed} others than the first, "
            "log-probabilities within {largest_difference:.3g}: {text!r}".format(
                **found["same_question"]
            )
        )
    return "\n".join(lines + [f"failure    {text}" for text in found["failures"]])
