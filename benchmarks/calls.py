"""What a call of decode costs beside its steps, without a server.

    python -m benchmarks.calls --random minicpm4.1-8b --context 32768 --rows 8

Rows of a session decode in calls of 1, 2, 4, … steps, each looked at as a server does
between two of them. With `--trace FOLDER` some calls of one step are written there as a
profile, for `benchmarks.timeline` and `benchmarks.profile_streams`.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.bench import language_model
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import choice, integer, path
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_file_option, add_option
from sparda_jax.config import CacheConfig
from sparda_jax.engine.session import Session
from sparda_jax.loading import with_attention
from sparda_jax.runtime import configure_offload

_CALLS = 20
_SIZES = (1, 2, 4, 8, 16)
_WARM = 2


def _look(session: Session) -> None:
    """What a server does between two calls."""
    for _ in session.take_events():
        pass
    _ = session.running


def _times(session: Session, call: Callable[[], object], count: int) -> dict[str, Any]:
    """Milliseconds of a call and the look behind it."""
    found = []
    for number in range(_WARM + count):
        begun = time.perf_counter()
        call()
        _look(session)
        if number >= _WARM:
            found.append((time.perf_counter() - begun) * 1e3)
    return {
        "ms_median": round(statistics.median(found), 3),
        "ms_least": round(min(found), 3),
        "ms_most": round(max(found), 3),
    }


def measure(
    session: Session, *, calls: int = _CALLS, trace: str | None = None
) -> list[dict[str, Any]]:
    """Times of calls of a session whose rows all decode, and go on to.

    Args:
      session: With room for about 60 times `calls` tokens of every row.
      calls: Of each kind.
      trace: Where to write a profile; None writes none.
    """
    found: list[dict[str, Any]] = []
    for steps in _SIZES:
        one = _times(session, lambda steps=steps: session.decode(steps), calls)
        a_step = round(one["ms_median"] / steps, 3)
        found.append({"what": "call", "steps": steps, "ms_a_step": a_step, **one})
    first, last = found[0], found[len(_SIZES) - 1]
    # A call of n steps takes a + n b.
    step = (last["ms_median"] - first["ms_median"]) / (last["steps"] - 1)
    beside = first["ms_median"] - step
    found.append(
        {"what": "fit", "ms_a_step": round(step, 3), "ms_beside": round(beside, 3)}
    )
    if trace is not None:
        with jax.profiler.trace(trace):
            for _ in range(3):
                session.decode(1)
                _look(session)
    return found


def _session(arguments: argparse.Namespace) -> Session:
    """A session all of whose rows decode."""
    shape = argparse.Namespace(**vars(arguments), model=None, dtype=None, forecast=None)
    lm = language_model(shape)
    cache = CacheConfig(kind=arguments.cache)
    lm = dataclasses.replace(with_attention(lm, "sparda"), cache=cache)
    tokens = sum(_SIZES) * (_WARM + _CALLS) + 16
    session = Session.open(
        lm,
        rows=arguments.rows,
        max_context=arguments.context + tokens,
        max_new_tokens=tokens,
        prefill_chunk=min(arguments.prefill_chunk, arguments.context),
    )
    session.warm_up()
    rng = np.random.default_rng(0)
    for _ in range(arguments.rows):
        prompt = rng.integers(0, lm.config.vocab_size, arguments.context).tolist()
        row = session.join(prompt, max_new_tokens=tokens, ignore_eos=True)
        while not session.prefill(row):
            pass
    return session


def _measure(arguments: argparse.Namespace) -> None:
    configure_offload()
    session = _session(arguments)
    lines = measure(session, trace=arguments.trace)
    for line in lines:
        print(line)
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}")
    if arguments.json is not None:
        about = {"device": device, "jax": jax.__version__}
        write_json(arguments.json, {**about, "calls": lines})


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser(
        prog="python -m benchmarks.calls",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    named = {"metavar": "PRESET", "default": "minicpm4.1-8b"}
    add_option(parser, "--random", path, help="shape, with random weights", **named)
    for name, default, help in (
        ("--layers", None, "fewer layers"),
        ("--context", 32768, "tokens of each prompt"),
        ("--rows", 8, "rows of the session"),
        ("--prefill-chunk", 4096, "tokens of a piece of a prompt"),
    ):
        check = integer(2 if name == "--layers" else 1)
        add_option(parser, name, check, metavar="N", default=default, help=help)
    kinds = ("resident", "offload")
    where = {"words": kinds, "default": "offload", "help": "where KV lives"}
    add_option(parser, "--cache", choice(*kinds), **where)
    add_option(parser, "--trace", path, metavar="FOLDER", help="write a profile there")
    add_file_option(parser, help="write the figures there")
    return run_command(lambda: _measure(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
