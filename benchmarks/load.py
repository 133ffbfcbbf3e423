"""`sparda bench serve`: requests against a server, as a stream of users sends them.

Closed loop: `--concurrency` users, each asks again when it is answered. Open loop:
requests come by `--rate` a second at random times (a Poisson process), whether the
server keeps up or not. Requests that fail are counted, and stand in every percentile as
answers that never came; the first `--warm-up` requests are in no figure.

With `--url` the server is another process, of ours or of anybody's with the same API.
Without, a model is served in this process, and the engine's own rate is measured first,
on the same rows without a server around them.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import (
    FLOAT_DTYPES,
    ConfigError,
    choice,
    file_to_write,
    integer,
    non_empty_text,
    number,
    path,
)
from sparda_jax.cli.console import note
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.config import device_blocks
from sparda_jax.sparse.selectors import selector_names

_EXAMPLES = """\
examples:
  sparda bench serve --model smollm2-135m --requests 32 --concurrency 4
      four users, and the engine's own rate beside it
  sparda bench serve --url http://127.0.0.1:8000 --rate 2 --cancel 0.1
      two requests a second of a server that runs, of which some lose patience
  sparda bench serve --random minicpm4.1-8b --attention sparda --cache offload \\
                     --max-batch 8 --prompt-tokens 32000 --shared-tokens 30000
      a shape with random weights; prompts that share their beginning
"""
_MOST_SHOWN = (50, 90, 99)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the load."""
    load = parser.add_argument_group("load")
    for name, check, default, metavar, help in (
        ("--requests", integer(1), 32, "N", "requests, without the warm-up"),
        ("--warm-up", integer(0), 2, "N", "requests before them, in no figure"),
        ("--concurrency", integer(1), 4, "N", "users of the closed loop"),
        ("--rate", number(above=0), None, "R", "requests a second: an open loop"),
        ("--prompt-tokens", integer(1), 256, "N", "tokens of a prompt, random ids"),
        ("--shared-tokens", integer(0), 0, "N", "of them, those that all begin with"),
        ("--output-tokens", integer(1), 64, "N", "tokens of an answer, all of them"),
        ("--cancel", number(least=0, most=1), 0.0, "P", "share that loses patience"),
        ("--seed", integer(0), 0, "N", "of prompts, times and patience"),
    ):
        add_option(load, name, check, metavar=metavar, default=default, help=help)
    written = file_to_write
    add_option(parser, "--json", written, metavar="F", help="write the figures there")


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
    """

    begun: float
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float = math.inf
    tokens: int = 0
    cached: int = 0
    failure: str | None = None
    cancelled: bool = False


async def ask(url: str, body: dict[str, Any], key: str | None) -> Result:
    """Sends one streaming request and reads its answer; never raises.

    Args:
      url: Of the server.
      body: Of /v1/completions.
      key: A bearer token, or None.
    """
    result = Result(time.perf_counter())
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=2**24)
        data = json.dumps(body).encode()
        head = [
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1",
            f"Host: {host}:{port}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
            *([] if key is None else [f"Authorization: Bearer {key}"]),
        ]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        await writer.drain()
        status = (await reader.readline()).split()
        while (await reader.readline()).strip():
            pass
        if status[1:2] != [b"200"]:
            text = (await reader.read(400)).decode(errors="replace")
            result.failure = f"{status[1:2]}: {text}"
            return result
        await _read_events(reader, result)
    except asyncio.CancelledError:
        result.cancelled = True
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        result.failure = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    return result


async def _read_events(reader: asyncio.StreamReader, result: Result) -> None:
    """Reads chunks of events up to the last."""
    held = b""
    while size := int((await reader.readline()).strip() or b"0", 16):
        held += await reader.readexactly(size)
        await reader.readline()
        *events, held = held.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: "):
                continue
            if event == b"data: [DONE]":
                result.ended = time.perf_counter()
                continue
            _take(json.loads(event[6:]), result)
    if not math.isfinite(result.ended) and result.failure is None:
        result.failure = "the stream ended early"


def _take(chunk: dict[str, Any], result: Result) -> None:
    if "error" in chunk:
        result.failure = str(chunk["error"])
        return
    if chunk.get("usage"):
        usage = chunk["usage"]
        result.tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        result.cached = details.get("cached_tokens", 0)
    choices = chunk["choices"]
    if choices and choices[0]["finish_reason"] is None:
        result.times.append(time.perf_counter())


def bodies(arguments: argparse.Namespace, vocab: int, model: str) -> list[dict]:
    """The requests, the warm-up's first.

    Args:
      arguments: Of the load.
      vocab: Token ids are below it.
      model: The model's name.
    """
    rng = np.random.default_rng(arguments.seed)
    shared = rng.integers(0, vocab, arguments.shared_tokens).tolist()
    own = max(arguments.prompt_tokens - len(shared), 1)
    return [
        {
            "model": model,
            "prompt": [*shared, *rng.integers(0, vocab, own).tolist()],
            "max_tokens": arguments.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(arguments.warm_up + arguments.requests)
    ]


async def run_load(
    arguments: argparse.Namespace, url: str, requests: Sequence[dict], key: str | None
) -> tuple[list[Result], float]:
    """Sends all requests; returns the results behind the warm-up, and their seconds."""
    for body in requests[: arguments.warm_up]:
        warm = await ask(url, body, key)
        if warm.failure is not None:
            note(f"warm-up: {warm.failure}")
    counted = requests[arguments.warm_up :]
    rng = np.random.default_rng((arguments.seed, 1))
    patience = [
        float(rng.random()) * 2.0 if rng.random() < arguments.cancel else None
        for _ in counted
    ]

    async def one(index: int) -> Result:
        task = asyncio.ensure_future(ask(url, counted[index], key))
        if patience[index] is not None:
            await asyncio.wait((task,), timeout=patience[index])
            task.cancel()
        return await task

    begun = time.perf_counter()
    if arguments.rate is None:
        found = await _closed(arguments.concurrency, len(counted), one)
    else:
        tasks = []
        for index in range(len(counted)):
            tasks.append(asyncio.ensure_future(one(index)))
            await asyncio.sleep(float(rng.exponential(1 / arguments.rate)))
        found = await asyncio.gather(*tasks)
    return found, time.perf_counter() - begun


async def _closed(
    users: int, count: int, one: Callable[[int], Awaitable[Result]]
) -> list[Result]:
    left = iter(range(count))
    found: list[Result] = []

    async def user() -> None:
        for index in left:
            found.append(await one(index))

    await asyncio.gather(*(user() for _ in range(users)))
    return found


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


def figures(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """What the requests got.

    Args:
      results: Of all requests but the warm-up's.
      seconds: From the first request to the last answer.
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
        "requests_per_second": round(len(good) / seconds, 4),
        "cached_tokens": sum(result.cached for result in results),
        "first_token_seconds": percentiles(firsts),
        "between_tokens_seconds": percentiles(gaps),
        "whole_seconds": percentiles(wholes),
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
        ("whole_seconds", "whole answer"),
    ):
        values = (found[name][f"p{p}"] for p in _MOST_SHOWN)
        cells = ("–" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"  {label:<17}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines + [f"failure    {text}" for text in found["failures"]])


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = Parser(
        prog="sparda bench serve",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_load_options(parser)
    source = parser.add_argument_group("server")
    add_option(source, "--url", non_empty_text, metavar="URL", help="of one that runs")
    add_option(source, "--api-key", non_empty_text, metavar="KEY", help="for --url")
    add_option(
        source,
        "--vocab",
        integer(2),
        default=1000,
        metavar="N",
        help="with --url: token ids of prompts are below it",
    )
    add_option(
        source,
        "--model",
        path,
        metavar="M",
        default="smollm2-135m",
        help="with --url: its name; else what to serve in this process",
    )
    add_option(
        source,
        "--random",
        path,
        metavar="PRESET",
        help="random weights of this shape in place of a model",
    )
    add_option(
        source,
        "--attention",
        choice(*selector_names()),
        metavar="A",
        default="sparda",
        help="how blocks are chosen",
    )
    kinds = ("resident", "offload", "auto")
    add_option(
        source,
        "--cache",
        choice(*kinds),
        words=kinds,
        default="resident",
        help="where KV lives",
    )
    add_option(
        source,
        "--device-blocks",
        device_blocks,
        metavar="C",
        default="auto",
        help="offload: device slots per layer and kv head, or auto",
    )
    add_option(
        source,
        "--layers",
        integer(2),
        metavar="N",
        help="fewer layers (with --random)",
    )
    add_option(
        source,
        "--dtype",
        choice(*FLOAT_DTYPES),
        words=FLOAT_DTYPES,
        help="of weights and cache",
    )
    for name, default, help in (
        ("--max-batch", 4, "rows"),
        ("--max-context", None, "tokens of a row (what the load needs)"),
        ("--prefill-chunk", 512, "tokens of a piece of a prompt"),
        ("--decode-steps", 1, "tokens between two looks at requests"),
    ):
        add_option(source, name, integer(1), metavar="N", default=default, help=help)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command `sparda bench serve`."""
    arguments = build_parser().parse_args(argv)
    if arguments.shared_tokens > arguments.prompt_tokens:
        raise ConfigError(
            f"--shared-tokens={arguments.shared_tokens} is not allowed: it must be at "
            f"most --prompt-tokens={arguments.prompt_tokens}"
        )
    if arguments.url is not None:
        requests = bodies(arguments, arguments.vocab, arguments.model)
        load = run_load(arguments, arguments.url, requests, arguments.api_key)
        found = {"load": figures(*asyncio.run(load))}
    else:
        from benchmarks.load_here import measure_here

        found = measure_here(arguments)
    chosen = {
        name: value for name, value in vars(arguments).items() if name != "api_key"
    }
    found = {"arguments": chosen, **found}
    if arguments.json is not None:
        write_json(arguments.json, found)
    for name, one in found.items():
        if name in ("load", "one_user"):
            print(f"{name.replace('_', ' ')}\n{table(one)}")
        elif name == "engine":
            print("engine     " + json.dumps(one))
