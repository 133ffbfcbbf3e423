"""`sparda bench serve` without `--url`: a server here, and its engine alone."""

import argparse
import asyncio
import dataclasses
import socket
import threading
import time
from typing import Any

import jax
import numpy as np

from benchmarks.bench import language_model
from benchmarks.load import bodies, figures, run_load
from sparda_jax.cli.console import note
from sparda_jax.config import CacheConfig
from sparda_jax.engine.session import Session
from sparda_jax.loading import with_attention
from sparda_jax.serving.server import Serving
from sparda_jax.serving.settings import ServeSettings

_NAME = "served"


def engine_rates(
    session: Session,
    prompt_tokens: int,
    output_tokens: int,
    vocab: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Decode rates of a session's rows without a server.

    One call of `decode` gives all further tokens, as `generate` does.

    Args:
      session: Without requests.
      prompt_tokens, output_tokens: Of every row.
      vocab: Token ids are below it.
      rng: Draws prompts that were not run before, and so are in no prefix store.
    """
    found: dict[str, Any] = {}
    for rows in sorted({1, session.rows}):
        taken = [
            session.join(
                rng.integers(0, vocab, prompt_tokens).tolist(),
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
        seconds = session.decode(output_tokens)
        for row in taken:
            session.leave(row)
        found[f"rows_{rows}"] = {
            "prefill_tokens_per_second": round(rows * prompt_tokens / prefill, 2),
            "decode_tokens_per_second": round(rows * (output_tokens - 1) / seconds, 3),
        }
    return found


def measure_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's rates, then those of one user and of the load.

    Args:
      arguments: Of the command.
    """
    from sparda_jax.runtime import configure_offload

    configure_offload()
    lm = language_model(argparse.Namespace(**vars(arguments), forecast=None))
    cache = CacheConfig(kind=arguments.cache, device_blocks=arguments.device_blocks)
    lm = dataclasses.replace(with_attention(lm, arguments.attention), cache=cache)
    needed = arguments.prompt_tokens + arguments.output_tokens
    settings = ServeSettings(
        model_name=_NAME,
        max_batch=arguments.max_batch,
        max_context=arguments.max_context or max(needed, arguments.output_tokens + 2),
        max_new_tokens=arguments.output_tokens,
        prefill_chunk=arguments.prefill_chunk,
        decode_steps=arguments.decode_steps,
    )
    serving = Serving(lm, settings)
    note(f"compiled {', '.join(serving.warm_up())}")
    vocab = lm.config.vocab_size
    # Twice: the first time fills caches and pools of the device.
    rng = np.random.default_rng((arguments.seed, 2))
    for _ in range(2):
        engine = engine_rates(
            serving.session,
            arguments.prompt_tokens,
            arguments.output_tokens,
            vocab,
            rng,
        )
    note(f"engine {engine}")
    serving.scheduler.start()
    listening = socket.create_server(("127.0.0.1", 0))
    server = serving.uvicorn("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        requests = bodies(arguments, vocab, _NAME)
        alone = argparse.Namespace(**vars(arguments))
        alone.rate, alone.concurrency, alone.cancel = None, 1, 0.0
        # Prompts of their own: those of the load shall not be in the prefix store.
        alone.seed = arguments.seed + 1
        few = bodies(alone, vocab, _NAME)[: arguments.warm_up + 3]
        one_user = figures(*asyncio.run(run_load(alone, url, few, None)))
        load = figures(*asyncio.run(run_load(arguments, url, requests, None)))
    finally:
        server.should_exit = True
        thread.join()
        serving.scheduler.stop(abort=True)
        listening.close()
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "engine": engine,
        "one_user": one_user,
        "load": load,
    }
