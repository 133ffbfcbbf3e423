"""Decode with offloaded KV: tokens/s beside a resident cache, at a model's full shape.

Weights are random and the KV blocks are arbitrary bytes: neither changes what a step
costs. Which blocks a step asks for does, so the choice is imposed, beside the scoring
that the attention really does (and that is timed): the lists that a real model chose,
from a trace that is mapped onto this shape (`benchmarks.traced`), or, with `--miss`, a
synthetic drift that makes a stated share of each list new at every step and never comes
back to what it has left.

  python -m benchmarks.offload --context 131072 --batch 4 8 16
  python -m benchmarks.offload --context 131072 --batch 20 --slots 1 2 3
  python -m benchmarks.offload --context 32768 --batch 4 --slots all
  python -m benchmarks.offload --context 32768 --batch 16 --miss 0.1    # synthetic

Modes, all in one run: `resident` (own-query selection, KV on the device), `sparse` (own
query, offloaded, each layer waits), `sparda-none` (Forecast, each layer waits),
`sparda` (looking one layer ahead), `sparda-2` (two), `sparda-late` (heads that read
behind attention: a fetch runs beside the MLP alone), `sparda-verify` (own queries have
the last word: what verifying costs). Figures are medians over timed chunks of steps,
with the least and the most. With more `--rounds` than one, each times all modes of a
batch, whose states are held at once, so that what disturbs a moment falls on all alike,
and shows.
`bound` is the least step time that the bandwidths of the same run allow
(`planning.step.step_time`), `reached` it over the median.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from benchmarks.offload_figures import CHUNK, HEAD, hidden, line, row_of
from benchmarks.offload_ways import (
    decode_request,
    held_state,
    imposed_choice,
    mode_settings,
)
from benchmarks.parsers import benchmark_parser
from benchmarks.traced import DEFAULT_TRACE, begin_rows
from sparda_jax.checks import ConfigError, integer, number, require
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option
from sparda_jax.config import HostCodec


def _budgets(name: str, value: object) -> float:
    return math.inf if value == "all" else number(above=0)(name, value)


def add_steps_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--steps`: at least a chunk of them, or there is no time of any."""
    steps = integer(CHUNK)
    add_option(parser, "--steps", steps, metavar="N", default=96, help="timed steps")


def add_size_options(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Adds `--layers`, or with `many` one or more of them, and `--limit`."""
    text = "fewer than the preset has" + "; one, or one a mesh" * many
    some = {"many": many, "default": [None] if many else None}
    add_option(parser, "--layers", integer(1), metavar="L", help=text, **some)
    size = {"default": 80, "metavar": "GB", "help": "memory of a device"}
    add_option(parser, "--limit", number(above=0), **size)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("offload", __doc__)
    parser.add_argument("--model", default="minicpm4.1-8b", help="preset")
    count = integer(1)
    size = {"default": 131072, "metavar": "N", "help": "tokens a row holds"}
    add_option(parser, "--context", count, **size)
    add_option(
        parser, "--batch", count, many=True, default=[8], metavar="B", help="rows"
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        default=["resident", "sparse", "sparda-none", "sparda"],
        choices=[
            *("resident", "resident-sparda", "sparse"),
            *("sparda-none", "sparda", "sparda-2", "sparda-late", "sparda-verify"),
        ],
    )
    parser.add_argument(
        "--trace", type=pathlib.Path, default=DEFAULT_TRACE, help="whose lists to take"
    )
    parser.add_argument(
        "--miss", type=float, help="instead: a drift that makes this share of lists new"
    )
    add_option(
        parser,
        "--slots",
        _budgets,
        many=True,
        metavar="SLOTS",
        default=[1.0],
        help="slots, in budgets, or all: one for every block",
    )
    parser.add_argument(
        "--codec", default="exact", choices=get_args(HostCodec), help="of host blocks"
    )
    parser.add_argument("--compressed-keys", default="exact", choices=["exact", "int8"])
    parser.add_argument("--layer0", default="resident", choices=["resident", "offload"])
    add_steps_option(parser)
    parser.add_argument("--route", default="auto")
    text = "of a fetch by a kernel: each a way of `sparda` of its own, but of no other"
    programs = {"many": True, "metavar": "N", "default": [None], "help": text}
    add_option(parser, "--gather-programs", count, **programs)
    text = "of all modes; with more than one all states are held at once"
    add_option(parser, "--rounds", count, metavar="N", default=1, help=text)
    add_size_options(parser)
    parser.add_argument("--profile", type=pathlib.Path, help="folder for a trace")
    add_file_option(parser)
    return parser


def _is_host_loop(settings) -> bool:
    """Whether decode is a Python loop of one call a layer."""
    return settings.offload is not None and not settings.offload.route.in_program


def _compile(model, state, request, settings: list, *, chosen: bool) -> list:
    """One program a mode, and the seconds that each took.

    The route `host_loop` has none: it compiles as it goes, in the warm-up. Kernels of
    products are chosen by timing them. Where none are `chosen` yet the first program is
    compiled alone, and what was chosen serves all others, side by side.
    """
    from sparda_jax.inference.generate import decode_loop_call
    from sparda_jax.inference.host_loop import decode_host_loop

    if any(map(_is_host_loop, settings)):
        return [
            (functools.partial(decode_host_loop, settings=s), 0.0) for s in settings
        ]

    lowered = [
        decode_loop_call.lower(model, state, request, settings=s) for s in settings
    ]

    def compiled(program):
        begun = time.perf_counter()
        return program.compile(), time.perf_counter() - begun

    alone = [] if chosen else [compiled(lowered[0])]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return [*alone, *pool.map(compiled, lowered[len(alone) :])]


def time_steps(call, settings, model, state, request, mode: str, arguments) -> tuple:
    """Seconds a step by chunk, blocks fetched a step, and the state behind them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def chunk(state, steps=CHUNK):
        begun = time.perf_counter()
        state = call(model, state, request._replace(steps=jnp.int32(steps)))
        jax.block_until_ready(state.done)
        return state, time.perf_counter() - begun

    # Modes of one kind follow each other on one state: rows begin anew, and every
    # mode finds its slots as a whole pass leaves them.
    state = begin_rows(state, arguments.context)
    for _ in range(arguments.steps // CHUNK):
        state, _ = chunk(state)
    state = begin_rows(state, arguments.context)
    for _ in range(2):
        state, _ = chunk(state)
    outside = 0.0
    if _is_host_loop(settings):
        # `host_loop` takes the store into NumPy's memory and back in every call, which
        # is no part of a step.
        empty = []
        for _ in range(3):
            state, taken = chunk(state, steps=0)
            empty.append(taken)
        outside = statistics.median(empty)
    before = int(np.sum(state.fetches.fetched.to_numpy()))
    seconds = []
    for _ in range(arguments.steps // CHUNK):
        state, taken = chunk(state)
        seconds.append((taken - outside) / CHUNK)
    fetched = int(np.sum(state.fetches.fetched.to_numpy())) - before
    if arguments.profile is not None:
        with jax.profiler.trace(arguments.profile / f"{mode}-{state.done.size}"):
            state, _ = chunk(state)
    return seconds, fetched / (len(seconds) * CHUNK), state


class _Case(NamedTuple):
    """One way to decode, compiled.

    Attributes:
      name: In the figures.
      mode: As `mode_settings` names it.
      way: Its cache and how its layers run.
      call: The program.
      compiling: Seconds that it took to compile.
    """

    name: str
    mode: str
    way: tuple
    call: Callable
    compiling: float


@dataclasses.dataclass
class _Group:
    """Ways that run on one state, with what they took by round."""

    slots: float | str | None
    cases: list[_Case]
    state: Any
    taken: list[list]
    fetched: list[float]


def _with_programs(way: tuple, programs: int | None) -> tuple:
    """A way whose fetches by a kernel are so many programs."""
    if programs is None:
        return way
    from sparda_jax.cache.routes import KernelRoute

    cache, how = way
    require(
        isinstance(how.offload.route, KernelRoute),
        "--gather-programs",
        programs,
        f"left out: the route {how.offload.route.name!r} is no kernel",
    )
    route = dataclasses.replace(how.offload.route, programs=programs)
    offload = dataclasses.replace(how.offload, route=route)
    return cache, dataclasses.replace(how, offload=offload)


def _fetches_by_programs(mode: str, slots: float) -> bool:
    """Whether `--gather-programs` has ways of its own for a mode."""
    return mode == "sparda" and slots != math.inf


def _check_programs(arguments) -> None:
    """Refuses `--gather-programs` where no way has a fetch that they are for."""
    ways = itertools.product(arguments.mode, arguments.slots)
    require(
        arguments.gather_programs == [None]
        or any(_fetches_by_programs(mode, slots) for mode, slots in ways),
        "--gather-programs",
        arguments.gather_programs,
        "left out: only --mode sparda with fewer --slots than all is timed with "
        "several",
    )


def _groups(model, sparse, batch: int, modes: list, arguments, trace):
    """Yields every state with its ways: the resident one, then by number of slots."""
    config, context = model.config, arguments.context
    new = arguments.steps + 4 * CHUNK
    request = decode_request(config, batch, context, new)
    choice = imposed_choice(arguments, trace, config, sparse, batch, new)
    cases = [(True, 1.0), *((False, slots) for slots in arguments.slots)]
    chosen = False
    for resident, slots in cases:
        wanted = [mode for mode in modes if mode.startswith("resident") == resident]
        if not wanted:
            continue
        names, ways = [], []
        for mode in wanted:
            way = mode_settings(config, sparse, mode, choice, slots, arguments)
            several = _fetches_by_programs(mode, slots)
            for programs in arguments.gather_programs if several else [None]:
                names.append((f"{mode}/{programs}" if programs else mode, mode))
                ways.append(_with_programs(way, programs))
        # "lookahead" before "none": the most fetches in flight, and areas for them.
        cache, how = min(ways, key=lambda way: (way[0].prefetch, -way[0].layers_ahead))
        state = held_state(model, how, batch, context, new, cache, choice.lists)
        hows, was_chosen, chosen = [how for _, how in ways], chosen, True
        programs = _compile(model, state, request, hows, chosen=was_chosen)
        made = [
            _Case(name, mode, way, call, seconds)
            for (name, mode), way, (call, seconds) in zip(
                names, ways, programs, strict=True
            )
        ]
        label = None if resident else "all" if slots == math.inf else slots
        yield request, _Group(label, made, state, [[] for _ in made], [0.0] * len(made))
        del state, programs, made


def measure_batch(model, sparse, batch: int, modes: list, arguments, rates, trace):
    """Yields the figures of every mode at one batch; resident ones come first.

    Offloaded ones follow for every number of slots.
    """
    import jax

    def row(group: _Group, place: int) -> dict:
        case, capacity = group.cases[place], group.state.cache.capacity
        taken, fetched = group.taken[place], group.fetched[place]
        figures = row_of(
            case.name, case.way, taken, fetched, capacity, rates, arguments, batch
        )
        return figures | {"slots": group.slots, "compile_s": case.compiling}

    def timed(request, group: _Group) -> Iterator[int]:
        for place, case in enumerate(group.cases):
            seconds, group.fetched[place], group.state = time_steps(
                case.call,
                case.way[1],
                model,
                group.state,
                request,
                case.name.replace("/", "-"),
                arguments,
            )
            group.taken[place].append(seconds)
            yield place

    groups = _groups(model, sparse, batch, modes, arguments, trace)
    if arguments.rounds == 1:
        for request, group in groups:
            for place in timed(request, group):
                yield row(group, place)
            # The next one's state needs this one's room.
            del request, group
            jax.clear_caches()
        return
    held = list(groups)
    for _ in range(arguments.rounds):
        for request, group in held:
            for _ in timed(request, group):
                pass
    for _, group in held:
        yield from (row(group, place) for place in range(len(group.cases)))
    held.clear()
    jax.clear_caches()


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_offload

    _check_programs(arguments)
    configure_offload()
    import jax

    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.spec import num_parameters
    from sparda_jax.models.weights import random_decoder
    from sparda_jax.planning.measure import measure_rates
    from sparda_jax.planning.traces import read_trace

    preset = get_preset(arguments.model)
    config = preset.shape(arguments.layers, 2 * arguments.context)
    keys = arguments.compressed_keys
    sparse = dataclasses.replace(preset.sparse, compressed_keys=keys)
    device = jax.devices()[0].device_kind
    trace = None if arguments.miss is not None else read_trace(arguments.trace)
    source = f"synthetic drift of {arguments.miss}"
    if trace is not None:
        source = f"lists of {trace.model}, {trace.text}, {trace.attention}"
    print(
        f"{arguments.model}, {config.num_layers} layers, {arguments.context} tokens, "
        f"budget {sparse.largest_budget}, {source}, {device}, JAX {jax.__version__}",
        flush=True,
    )
    rates = measure_rates(route=arguments.route).rates
    print(
        f"link {(rates.link or 0) / 1e9:.1f} GB/s, listed blocks "
        f"{rates.fetch / 1e9:.1f} GB/s, device memory {rates.memory / 1e9:.0f} GB/s",
        flush=True,
    )
    model = random_decoder(config, "bfloat16", forecast=True)
    rows: list[dict] = []
    figures = {
        "device": device,
        "jax": jax.__version__,
        "model": arguments.model,
        "context": arguments.context,
        "miss": arguments.miss,
        "codec": arguments.codec,
        "compressed_keys": arguments.compressed_keys,
        "trace": None if trace is None else arguments.trace.name,
        "lists": source,
        "rates": dataclasses.asdict(rates),
        "rows": rows,
    }
    print(HEAD)
    for batch in arguments.batch:
        token_bytes = 4 * config.num_kv_heads * config.head_dim * config.num_layers
        kv_bytes = batch * arguments.context * token_bytes
        resident_gb = (num_parameters(config) * 2 + kv_bytes) / 1e9
        modes = list(arguments.mode)
        if resident_gb > arguments.limit:
            modes = [mode for mode in modes if not mode.startswith("resident")]
            print(
                f"resident {batch:12} does not fit: {resident_gb:.0f} GB of weights "
                f"and KV, the limit is {arguments.limit:.0f} GB"
            )
        try:
            measured = measure_batch(
                model, sparse, batch, modes, arguments, rates, trace
            )
            for row in measured:
                rows.append(row)
                print(line(row), flush=True)
                if arguments.json:
                    write_json(arguments.json, figures)
        except ConfigError:
            raise
        except Exception as error:  # one batch's failure must not hide the others
            print(f"batch {batch} failed: {error!r}"[:300], flush=True)
        said = hidden([row for row in rows if row["batch"] == batch])
        print(*said, sep="\n", end="\n" if said else "", flush=True)
    if not rows or not all(math.isfinite(row["step_ms"]) for row in rows):
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
