"""`sparda bench serve`: requests against a server, as a stream of users sends them.

Closed loop: `--concurrency` users, each asks again when it is answered. Open loop:
requests come by `--rate` a second at random times (a Poisson process), whether the
server keeps up or not; with `--sweep` at several rates, one after another. Requests
that fail are counted, and stand in every percentile as answers that never came; the
first `--warm-up` requests are in no figure.

With `--url` the server is another process, of ours or of anybody's with the same API.
Without, a model is served by this process to users in another one, and measured first:
`generate` with one prompt, and the engine on the same rows without a server around it.
`--json` is written after each part of it.
"""

import argparse
import asyncio
import json
import math
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.load_figures import Result, figures, table
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import (
    FLOAT_DTYPES,
    LARGEST_BYTES,
    Check,
    ConfigError,
    choice,
    file_to_write,
    integer,
    non_empty_text,
    number,
    path,
    require,
    shown,
)
from sparda_jax.cli.cache_options import add_codec_option
from sparda_jax.cli.console import note
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.cli.packages import needs
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
# Of all prompts together, which are made before the first is sent.
_MOST_TOKENS = 2**28
_COUNT = integer(0)


def server_url(field: str, value: object) -> str:
    """Checks an address of a server.

    Raises:
      ConfigError: If it is none.
    """
    found = non_empty_text(field, value)
    try:
        parts = urllib.parse.urlsplit(found)
        good = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
        good = good and not (parts.query or parts.fragment or parts.username)
    except ValueError:  # No port, or no address in brackets.
        good = False
    good = good and found.isascii() and found.isprintable() and " " not in found
    require(good, field, value, "like http://127.0.0.1:8000, with a path or without")
    return found


def header_text(field: str, value: object) -> str:
    """Checks a text that can stand in a line of HTTP's head.

    Raises:
      ConfigError: If it cannot.
    """
    found = non_empty_text(field, value)
    require(found.isprintable(), field, value, "text on one line")
    return found


# Of the load: check, default, metavar, help.
LOAD_OPTIONS: Mapping[str, tuple[Check[Any], Any, str, str]] = {
    "requests": (integer(1, 2**24), 32, "N", "requests, without the warm-up"),
    "warm_up": (integer(0, 2**24), 2, "N", "requests before them, in no figure"),
    "concurrency": (integer(1, 2**16), 4, "N", "users of the closed loop"),
    "minutes": (
        number(least=1e-3, most=1e5),
        None,
        "M",
        "send none after that time, however many are left",
    ),
    "rate": (
        number(least=1e-4, most=1e6),
        None,
        "R",
        "requests a second: an open loop",
    ),
    "prompt_tokens": (integer(1), 256, "N", "tokens of a prompt, random ids"),
    "shared_tokens": (integer(0), 0, "N", "of them, those that all begin with"),
    "output_tokens": (integer(1), 64, "N", "tokens of an answer, all of them"),
    "cancel": (number(least=0, most=1), 0.0, "P", "share that loses patience"),
    "same_every": (
        integer(0),
        0,
        "N",
        "every N-th request asks the same, and should get the same; 0 is none",
    ),
    "same_prompt": (
        non_empty_text,
        None,
        "TEXT",
        "what these ask, like a text that hides a number (random tokens)",
    ),
    "seed": (integer(0), 0, "N", "of prompts, times and patience"),
}


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the load."""
    load = parser.add_argument_group("load")
    for name, (check, default, metavar, help) in LOAD_OPTIONS.items():
        option = "--" + name.replace("_", "-")
        add_option(load, option, check, metavar=metavar, default=default, help=help)
    add_option(
        load,
        "--sweep",
        number(least=1e-4, most=1e6),
        metavar="R",
        repeated=True,
        help="then an open loop at this rate; may be given several times",
    )
    written = file_to_write
    add_option(parser, "--json", written, metavar="F", help="write the figures there")


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
    # A server of anybody's may answer anything.
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError) as e:
        result.failure = f"{type(e).__name__}: {e}"
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


def _take(chunk: Any, result: Result) -> None:
    """Takes an event; errors of many kinds where it is none of this API."""
    if "error" in _object(chunk):
        result.failure = str(chunk["error"])
        return
    if chunk.get("usage"):
        usage = _object(chunk["usage"])
        result.tokens = _COUNT("completion_tokens", usage["completion_tokens"])
        details = _object(usage.get("prompt_tokens_details") or {})
        result.cached = _COUNT("cached_tokens", details.get("cached_tokens", 0))
    for given in chunk["choices"]:
        if _object(given)["finish_reason"] is None:
            result.times.append(time.perf_counter())
        result.text += given["text"]
        logs = _object(given.get("logprobs") or {}).get("token_logprobs", ())
        result.logprobs += [float(log) for log in logs]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{shown(value)} is no object")
    return value


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
    made = [
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
    for index in _fixed(arguments):
        asked = arguments.same_prompt or made[arguments.warm_up]["prompt"]
        made[arguments.warm_up + index] |= {"prompt": asked, "logprobs": 0}
    return made


def _fixed(arguments: argparse.Namespace) -> range:
    """Which requests ask the same, counted behind the warm-up."""
    every = arguments.same_every
    return range(0, arguments.requests, every) if every else range(0)


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

    fixed = _fixed(arguments)

    async def one(index: int) -> Result:
        task = asyncio.ensure_future(ask(url, counted[index], key))
        if patience[index] is not None and index not in fixed:
            await asyncio.wait((task,), timeout=patience[index])
            task.cancel()
        result = await task
        result.fixed = index in fixed
        return result

    begun = time.perf_counter()
    minutes = arguments.minutes or math.inf

    def in_time() -> Iterator[int]:
        for index in range(len(counted)):
            if time.perf_counter() - begun > minutes * 60:
                note(f"{minutes:g} minutes are over: {index} requests were sent")
                return
            yield index

    if arguments.rate is None:
        found = await _closed(arguments.concurrency, in_time(), one)
    else:
        tasks = []
        for index in in_time():
            tasks.append(asyncio.ensure_future(one(index)))
            await asyncio.sleep(float(rng.exponential(1 / arguments.rate)))
        found = await asyncio.gather(*tasks)
    return found, time.perf_counter() - begun


async def _closed(
    users: int, left: Iterator[int], one: Callable[[int], Awaitable[Result]]
) -> list[Result]:
    found: list[Result] = []

    async def user() -> None:
        for index in left:
            found.append(await one(index))

    await asyncio.gather(*(user() for _ in range(users)))
    return found


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
    add_option(source, "--url", server_url, metavar="URL", help="of one that runs")
    add_option(source, "--api-key", header_text, metavar="KEY", help="for --url")
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
    add_codec_option(source)
    add_option(
        source,
        "--layers",
        integer(2),
        metavar="N",
        help="fewer layers (with --random)",
    )
    add_option(
        source,
        "--trace",
        path,
        metavar="FILE",
        help="block lists of this trace, not those of random weights (with --random)",
    )
    add_option(
        source,
        "--dtype",
        choice(*FLOAT_DTYPES),
        words=FLOAT_DTYPES,
        help="of weights and cache",
    )
    for name, default, help in (
        ("--max-batch", 4, "rows; with --url those that the server has"),
        ("--max-context", None, "tokens of a row (what the load needs)"),
        ("--prefill-chunk", 512, "tokens of a piece of a prompt"),
        ("--decode-steps", 32, "most tokens between two looks at requests"),
    ):
        add_option(source, name, integer(1), metavar="N", default=default, help=help)
    add_option(
        source,
        "--prefix-bytes",
        integer(0, LARGEST_BYTES),
        metavar="N",
        default=2**30,
        help="host memory for beginnings that prompts share",
    )
    return parser


def sweep(
    arguments: argparse.Namespace, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The loops of `--sweep`, with seeds from `seed` on.

    Yields:
      The name of a loop's figures, and the options that are its own.
    """
    for own, rate in enumerate(arguments.sweep, start=seed):
        yield f"load_at_{rate:g}_a_second", {"rate": rate, "seed": own}


def _of_url(arguments: argparse.Namespace) -> dict[str, Any]:
    requests = bodies(arguments, arguments.vocab, arguments.model)
    load = run_load(arguments, arguments.url, requests, arguments.api_key)
    results, seconds = asyncio.run(load)
    return figures(results, seconds, arguments.max_batch)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `sparda bench serve`; status 1 if no request was completed."""
    arguments = build_parser().parse_args(argv)
    if arguments.shared_tokens > arguments.prompt_tokens:
        raise ConfigError(
            f"--shared-tokens={arguments.shared_tokens} is not allowed: it must be at "
            f"most --prompt-tokens={arguments.prompt_tokens}"
        )
    tokens = (arguments.warm_up + arguments.requests) * arguments.prompt_tokens
    if tokens > _MOST_TOKENS:
        raise ConfigError(
            f"--prompt-tokens={arguments.prompt_tokens} is not allowed: all requests "
            f"together may have {_MOST_TOKENS} prompt tokens, and these have {tokens}"
        )
    chosen = {
        name: value for name, value in vars(arguments).items() if name != "api_key"
    }

    def write(figures: dict[str, Any]) -> None:
        if arguments.json is not None:
            write_json(arguments.json, {"arguments": chosen, **figures})

    if arguments.url is not None:
        found = {"load": _of_url(arguments)}
        for name, other in sweep(arguments, arguments.seed + 1):
            again = argparse.Namespace(**{**vars(arguments), **other})
            found[name] = _of_url(again)
    else:
        with needs("serve"):
            from benchmarks.load_here import measure_here

        found = measure_here(arguments, write)
    write(found)
    for name, one in found.items():
        if isinstance(one, dict) and "between_tokens_seconds" in one:
            print(f"{name.replace('_', ' ')}\n{table(one)}")
        elif name in ("generate", "engine", "served"):
            print(f"{name:<11}" + json.dumps(one))
    load = found["load"]
    if load["failed"] and not load["completed"]:
        raise SystemExit(1)
