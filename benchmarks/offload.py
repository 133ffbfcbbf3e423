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
with the least and the most. `bound` is the least step time that the bandwidths of the
same run allow (`planning.step.step_time`), `reached` it over the median.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import pathlib
import statistics
import sys
import time
from typing import get_args

from benchmarks.parsers import add_file_option, benchmark_parser
from benchmarks.traced import (
    DEFAULT_TRACE,
    TracedLists,
    begin_rows,
    check_room,
    install,
    map_trace,
    traced_selector,
)
from sparda_jax.checks import ConfigError, integer, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_option
from sparda_jax.config import HostCodec

CHUNK = 8
# Modes whose fetches run beside compute.
_AHEAD = ("sparda", "sparda-2", "sparda-late", "sparda-verify")


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
    add_size_options(parser)
    parser.add_argument("--profile", type=pathlib.Path, help="folder for a trace")
    add_file_option(parser)
    return parser


def _drifting(tile, real, rate: float):
    """Block scores whose top list drifts, in the place of real ones.

    Block b of M stands at place (odd · b) mod M of a circle; a step moves the window of
    best places on by `rate`. Rows and heads start at places of their own.
    """
    import jax.numpy as jnp

    batch, heads, _, count = real.shape
    rows = jnp.arange(batch)[:, None, None, None] * 37
    rows = rows + jnp.arange(heads)[None, :, None, None] * 11
    moved = jnp.floor(rate * tile.positions).astype(jnp.int32)[:, None, :, None]
    place = (jnp.arange(count) * 769 - moved - rows) % count
    # `real` decides nothing, but the compiler cannot know that.
    drift = -place.astype(jnp.float32)
    return jnp.where(real > 1e30, real, jnp.where(real == -jnp.inf, real, drift))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is imposed on the choice of blocks.

    Attributes:
      lists: A trace's lists, mapped; None for the synthetic drift.
      context: Tokens that rows hold at the beginning.
      rate: Blocks of a list that the drift makes new at a step.
    """

    lists: TracedLists | None
    context: int
    rate: float


def _selector(mode: str, choice: Choice):
    """A mode's selector, which scores as ever and chooses what is imposed."""
    from sparda_jax.sparse.selectors import get_selector

    own = mode in ("resident", "sparse")
    found = get_selector("infllm_v2" if own else "sparda")
    if choice.lists is not None:
        return traced_selector(found, choice.lists, context=choice.context)

    @dataclasses.dataclass(frozen=True)
    class Drifting(type(found)):
        rate: float = 0.0

        name = mode

        def score(self, tile, config, sparse, implementation):
            real = super().score(tile, config, sparse, implementation)
            return _drifting(tile, real, self.rate)

    return Drifting(choice.rate)


def imposed_choice(arguments, trace, config, sparse, batch: int, new: int) -> Choice:
    """What one batch's steps choose."""
    if trace is None:
        return Choice(None, arguments.context, arguments.miss * sparse.largest_budget)
    lists = map_trace(
        trace,
        layers=config.num_layers,
        rows=batch,
        kv_heads=config.num_kv_heads,
        scored=sparse.largest_budget - sparse.forced_blocks,
        tokens=new,
    )
    check_room(lists, arguments.context, sparse)
    return Choice(lists, arguments.context, 0.0)


def held_state(model, settings, batch: int, context: int, new: int, cache, lists):
    """A state whose rows hold `context` tokens of arbitrary bytes."""
    from sparda_jax.inference.generate import new_state
    from sparda_jax.inference.shapes import Shapes

    block = settings.sparse.block_size
    capacity = context + -(-new // block) * block
    shapes = Shapes(prompt=0, new=new, capacity=capacity, tile=1024)
    state = new_state(model, settings, batch, shapes, cache)
    if lists is not None:
        state = state._replace(cache=install(state.cache, lists))
    return begin_rows(state, context)


def mode_settings(config, sparse, mode: str, choice: Choice, slots: float, arguments):
    """A mode's cache and how its layers run."""
    from sparda_jax.cache.settings import LayerSettings
    from sparda_jax.config import CacheConfig
    from sparda_jax.planning.auto import offload_settings

    selector = _selector(mode, choice)
    every = -(-arguments.context * 2 // sparse.block_size)
    cache = CacheConfig(
        device_blocks=round(min(slots * sparse.largest_budget, every)),
        kind="resident" if mode.startswith("resident") else "offload",
        prefetch="lookahead" if mode in _AHEAD else "none",
        layers_ahead=2 if mode == "sparda-2" else 1,
        exactness="verify" if mode == "sparda-verify" else "forecast",
        route=arguments.route,
        codec=arguments.codec,
        layer0=arguments.layer0,
    )
    offload = offload_settings(cache, selector)
    if mode == "sparda-late":
        config = dataclasses.replace(config, forecast_reads="attended")
    return cache, LayerSettings(config, sparse, selector, offload=offload)


def decode_request(config, batch: int, context: int, new: int):
    import jax.numpy as jnp

    from sparda_jax.inference.generate import Request
    from sparda_jax.inference.sampling import SamplingConfig, sampling_state
    from sparda_jax.models.rope import model_rope

    return Request(
        sampling=sampling_state(SamplingConfig(), 0, batch),
        stops=jnp.full((16,), -1, jnp.int32),
        max_new=jnp.full((batch,), new, jnp.int32),
        steps=jnp.int32(CHUNK),
        rope=model_rope(config, context + new),
    )


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


def _row(mode, cache, settings, seconds, fetched, capacity, rates, arguments, batch):
    """The figures of one mode."""
    import jax.numpy as jnp

    from sparda_jax.planning.step import step_time

    config, sparse = settings.config, settings.sparse
    block_bytes = stored = sparse.block_size * 2 * config.head_dim * 2
    if settings.offload is not None:
        shape = (sparse.block_size, 2, config.head_dim)
        stored = settings.offload.codec.bytes_per_block(shape, jnp.bfloat16)
    listed = batch * config.num_kv_heads * config.num_layers * sparse.largest_budget
    median = statistics.median(seconds)
    bound = step_time(
        settings,
        cache,
        rates,
        batch=batch,
        capacity=capacity,
        context=arguments.context,
        dtype=jnp.bfloat16,
        miss=fetched / listed,
    )
    return {
        "mode": mode,
        "batch": batch,
        "step_ms": median * 1e3,
        "least_ms": min(seconds) * 1e3,
        "most_ms": max(seconds) * 1e3,
        "tokens_per_second": batch / median,
        "steps": len(seconds) * CHUNK,
        "fetched_mb": fetched * stored / 1e6,
        "fetched_share": fetched / listed,
        "attended_gb": listed * block_bytes / 1e9,
        "bound_ms": bound.bound * 1e3,
        "bound_by": bound.bound_by,
        "bound_share": bound.bound / median,
        "planned_ms": bound.seconds * 1e3,
    }


def measure_batch(model, sparse, batch: int, modes: list, arguments, rates, trace):
    """Yields the figures of every mode at one batch; resident ones come first.

    Offloaded ones follow for every number of slots.
    """
    import jax

    config, context = model.config, arguments.context
    new = arguments.steps + 4 * CHUNK
    request = decode_request(config, batch, context, new)
    choice = imposed_choice(arguments, trace, config, sparse, batch, new)
    cases = [(True, 1.0), *((False, slots) for slots in arguments.slots)]
    chosen = False
    for resident, slots in cases:
        group = [mode for mode in modes if mode.startswith("resident") == resident]
        if not group:
            continue
        ways = [
            mode_settings(config, sparse, mode, choice, slots, arguments)
            for mode in group
        ]
        # "lookahead" before "none": the most fetches under way, and areas for them.
        cache, how = min(ways, key=lambda way: (way[0].prefetch, -way[0].layers_ahead))
        state = held_state(model, how, batch, context, new, cache, choice.lists)
        capacity = state.cache.capacity
        hows, was_chosen, chosen = [how for _, how in ways], chosen, True
        programs = _compile(model, state, request, hows, chosen=was_chosen)
        for mode, (cache, how), (call, compiling) in zip(
            group, ways, programs, strict=True
        ):
            seconds, fetched, state = time_steps(
                call, how, model, state, request, mode, arguments
            )
            row = _row(
                mode, cache, how, seconds, fetched, capacity, rates, arguments, batch
            )
            yield row | {
                "slots": None if resident else "all" if slots == math.inf else slots,
                "compile_s": compiling,
            }
        del state, programs
        jax.clear_caches()


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_offload

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
    print(
        f"{'mode':16} {'batch':>5} {'slots':>5} {'step, ms':>9} "
        f"{'least':>7} {'most':>7} "
        f"{'tokens/s':>9} {'fetched, MB':>11} {'of lists':>8} {'bound, ms':>9} "
        f"{'reached':>7} {'compile, s':>10}"
    )
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
                print(
                    f"{row['mode']:16} {batch:5} {row['slots'] or '':>5} "
                    f"{row['step_ms']:9.2f} "
                    f"{row['least_ms']:7.2f} {row['most_ms']:7.2f} "
                    f"{row['tokens_per_second']:9.1f} {row['fetched_mb']:11.1f} "
                    f"{row['fetched_share']:8.3f} {row['bound_ms']:9.2f} "
                    f"{row['bound_share']:7.0%} {row['compile_s']:10.1f}",
                    flush=True,
                )
                if arguments.json:
                    write_json(arguments.json, figures)
        except ConfigError:
            raise
        except Exception as error:  # one batch's failure must not hide the others
            print(f"batch {batch} failed: {error!r}"[:300], flush=True)
    if not rows or not all(math.isfinite(row["step_ms"]) for row in rows):
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
