"""`sparda bench serve` without `--url`: a server here, and its engine alone."""

import argparse
import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np

from benchmarks.bench import language_model
from benchmarks.imposed import imposing, lists_of
from benchmarks.load import LOAD_OPTIONS, sweep
from benchmarks.traced import check_room
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import ConfigError, require
from sparda_jax.cli.console import note
from sparda_jax.config import CacheConfig
from sparda_jax.engine.api import generate
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.session import Session
from sparda_jax.loading import with_attention
from sparda_jax.serving.server import Serving
from sparda_jax.serving.settings import ServeSettings

_NAME = "served"
# Tokens of the prompts that come before those that count.
_SHORT = 256


def engine_rates(
    session: Session,
    prompt_tokens: int,
    output_tokens: int,
    vocab: int,
    rng: np.random.Generator,
    *,
    shared_tokens: int = 0,
) -> dict[str, Any]:
    """Decode rates of a session's rows without a server.

    One call of `decode` gives all further tokens, as `generate` does. Before the calls
    that count, every row has one with a short prompt: it fills pools of the device.

    Args:
      session: Without requests.
      prompt_tokens, output_tokens: Of every row.
      vocab: Token ids are below it.
      rng: Draws prompts that were not run before, and so are in no prefix store.
      shared_tokens: With which prompts of that length begin alike, once they have been
        run: prefill's rate counts the tokens that were.
    """
    found: dict[str, Any] = {}
    shared = rng.integers(0, vocab, shared_tokens).tolist()
    warm = ((min(prompt_tokens, _SHORT), rows) for rows in (session.rows, 1))
    counted = ((prompt_tokens, rows) for rows in sorted({1, session.rows}))
    for tokens, rows in (*warm, *counted):
        begins = shared if tokens == prompt_tokens else []
        own = max(tokens - len(begins), 1)
        taken = [
            session.join(
                [*begins, *rng.integers(0, vocab, own).tolist()],
                max_new_tokens=output_tokens,
                ignore_eos=True,
            )
            for _ in range(rows)
        ]
        begun = time.perf_counter()
        for row in taken:
            while not session.prefill(row):
                pass
        prefill = time.perf_counter() - begun
        run = rows * (len(begins) + own) - sum(map(session.cached_tokens, taken))
        seconds = session.decode(output_tokens)
        for row in taken:
            session.leave(row)
        found[f"rows_{rows}"] = {
            "prefill_tokens_per_second": round(run / prefill, 2),
            "decode_tokens_per_second": round(rows * (output_tokens - 1) / seconds, 3),
        }
    return found


def generate_rates(
    lm: LanguageModel,
    prompt_tokens: int,
    output_tokens: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Rates of `generate` with one prompt; the median of three calls.

    Args:
      lm: The model.
      prompt_tokens, output_tokens: Of the call.
      rng: Draws the prompts.
    """
    rates = sorted(_generate(lm, prompt_tokens, output_tokens, rng) for _ in range(3))
    return {"decode_tokens_per_second": round(rates[1], 3)}


def _generate(
    lm: LanguageModel, prompt_tokens: int, output_tokens: int, rng: np.random.Generator
) -> float:
    """Decoded tokens a second of `generate` with one prompt."""
    prompt = rng.integers(0, lm.config.vocab_size, prompt_tokens).tolist()
    given = generate(lm, [prompt], max_new_tokens=output_tokens, ignore_eos=True)
    return given.stats.decode_tokens_per_second or 0.0


def _users(
    arguments: argparse.Namespace, url: str, vocab: int, other: dict[str, Any]
) -> dict[str, Any]:
    """Sends the load from another process; returns its figures.

    Args:
      arguments: Of the command.
      url: Of the server.
      vocab: Token ids are below it.
      other: Options of the load that are others than those of the command.
    """
    chosen = {name: getattr(arguments, name) for name in LOAD_OPTIONS} | other
    chosen |= {"url": url, "vocab": vocab, "model": _NAME}
    chosen["max_batch"] = arguments.max_batch
    with tempfile.TemporaryDirectory() as folder:
        chosen["json"] = f"{folder}/figures.json"
        command = [sys.executable, "-m", "benchmarks.bench", "serve"]
        for name, value in chosen.items():
            if value is not None:
                command += ["--" + name.replace("_", "-"), str(value)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        found = read_json(chosen["json"])
        # 1: no request was completed; figures say it.
        if done.returncode not in (0, 1) or found is None:
            raise ConfigError(
                f"the process of the users has ended with status {done.returncode} and "
                "no figures; it has said why"
            )
        return cast(Any, found)["load"]


def shares(found: dict[str, Any], rows: int) -> dict[str, float]:
    """What is left of rates that need no server, as far as they are measured.

    Args:
      found: Figures by part, as `measure_here` gives them.
      rows: Of the server.

    Returns:
      Of `generate` with one prompt: the engine's row without a server, and one user.
      Of the engine: one user, and the rate while all rows are taken.
    """
    engine, users, load = (found.get(x, {}) for x in ("engine", "one_user", "load"))
    alone = found["generate"]["decode_tokens_per_second"]
    row, full = (
        engine.get(f"rows_{n}", {}).get("decode_tokens_per_second") for n in (1, rows)
    )
    gap = users.get("between_tokens_seconds", {}).get("p50")
    user = 1 / gap if gap else None
    pairs = {
        "engine_row_of_generate": (row, alone),
        "one_user_of_generate": (user, alone),
        "one_user_of_engine": (user, row),
        "full_batch_of_engine": (load.get("full_batch_tokens_per_second"), full),
    }
    return {
        name: round(part / whole, 4)
        for name, (part, whole) in pairs.items()
        if part and whole
    }


def _model(arguments: argparse.Namespace) -> LanguageModel:
    """What is served."""
    lm = language_model(argparse.Namespace(**vars(arguments), forecast=None))
    lm = with_attention(lm, arguments.attention)
    if arguments.trace is not None:
        require(arguments.random is not None, "--trace", arguments.trace, "of --random")
        lists = lists_of(pathlib.Path(arguments.trace), lm.config, lm.sparse, 1)
        assert lists is not None
        check_room(lists, arguments.prompt_tokens, lm.sparse)
        lm = dataclasses.replace(lm, selector=imposing(lm.selector, lists, decode=True))
    cache = CacheConfig(
        kind=arguments.cache,
        device_blocks=arguments.device_blocks,
        codec=arguments.host_codec,
    )
    return dataclasses.replace(lm, cache=cache)


def _settings(arguments: argparse.Namespace) -> ServeSettings:
    """What the server is told."""
    needed = arguments.prompt_tokens + arguments.output_tokens
    return ServeSettings(
        model_name=_NAME,
        max_batch=arguments.max_batch,
        max_context=arguments.max_context or max(needed, arguments.output_tokens + 2),
        max_new_tokens=arguments.output_tokens,
        prefill_chunk=arguments.prefill_chunk,
        decode_steps=arguments.decode_steps,
        prefix_bytes=arguments.prefix_bytes,
    )


def measure_here(
    arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The rates of `generate` and of the engine, then those of one user and the load.

    Args:
      arguments: Of the command.
      write: Called with what there is after each part.
    """
    from sparda_jax.runtime import configure_offload

    configure_offload()
    lm = _model(arguments)
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    begun = time.perf_counter()

    def tell(what: str) -> None:
        note(f"{what} ({time.perf_counter() - begun:.0f} s)")

    def keep(name: str, figures: Any) -> None:
        found[name] = figures
        tell(f"{name} {json.dumps(figures)}")
        found["served"] = shares(found, arguments.max_batch)
        write(found)

    serving = Serving(lm, _settings(arguments))
    tell("memory is taken")
    vocab = lm.config.vocab_size
    rng = np.random.default_rng((arguments.seed, 2))
    lengths = (arguments.prompt_tokens, arguments.output_tokens)
    with ThreadPoolExecutor(1) as pool:
        # Programs of `generate` are compiled beside those of the server.
        first = pool.submit(_generate, lm, *lengths, rng)
        tell(f"compiled {', '.join(serving.warm_up())}")
        found["ready_seconds"] = round(time.perf_counter() - begun, 1)
        first.result()
    tell("compiled those of generate")
    keep("generate", generate_rates(lm, *lengths, rng))
    shared = arguments.shared_tokens
    keep(
        "engine",
        engine_rates(serving.session, *lengths, vocab, rng, shared_tokens=shared),
    )
    serving.scheduler.start()
    listening = socket.create_server(("127.0.0.1", 0))
    server = serving.uvicorn("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        # Prompts of their own: those of the load shall not be in the prefix store.
        alone = {"requests": 3, "concurrency": 1, "seed": arguments.seed + 1}
        alone |= dict.fromkeys(("minutes", "rate", "cancel", "same_every"))
        keep("one_user", _users(arguments, url, vocab, alone))
        keep("load", _users(arguments, url, vocab, {}))
        for name, other in sweep(arguments, arguments.seed + 2):
            keep(name, _users(arguments, url, vocab, other))
    finally:
        server.should_exit = True
        thread.join()
        serving.scheduler.stop(abort=True)
        listening.close()
    return found
