"""Whole prefill through the public API: tokens/s, time to first token, time by part.

  python -m benchmarks.prefill                                    # 128k, 32 layers
  python -m benchmarks.prefill --context 32768 131072 --batch 1 4 --layers 8

A model of random weights at a preset's shape runs `generate(max_new_tokens=1)` with
every `--attention` in every `--cache`, after a first call that compiles. Weights change
no cost, block lists do: imposed are a real model's, of `--trace` (`benchmarks.imposed`
says how), which costs a pass over the scores, a part of the rest. `--agree N` instead
leaves what random weights choose, for every token anew, and gives N neighbouring tokens
the list of the first of them (1 leaves lists as they are). All tokens are scored and
choose all the same. `first` is the whole call without compilation: prefill, the cache's
allocation and the first token.

`limit` is the least time that the products and the attention to the listed keys (dense:
to all before a token) allow at the matrix rate that was measured in the same run.
Fewer layers than the preset has are said in every line: nothing is extrapolated.
`--together` makes the first calls, most of a run's time, side by side before anything
is timed; all cases have to fit into memory at once then. `--enough 10` times a case of
more than ten seconds once, whatever `--repeats` says. `--parts` adds a profiled
call: kernel time by part, and the largest of the rest.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NoReturn

from benchmarks.imposed import lists_of, selector_with
from benchmarks.parsers import benchmark_parser
from benchmarks.parts import by_part
from benchmarks.traced import DEFAULT_TRACE
from sparda_jax.checks import ConfigError, integer, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option

# SparDA's published prefill of MiniCPM4.1-8B: an H100, batch 4.
REFERENCE_TOKENS_PER_SECOND = 17_088


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("prefill", __doc__)
    parser.add_argument("--model", default="minicpm4.1-8b", help="preset")
    count = integer(1)
    add_option(
        parser,
        "--context",
        count,
        many=True,
        default=[131072],
        metavar="N",
        help="tokens of a prompt",
    )
    add_option(
        parser, "--batch", count, many=True, default=[1], metavar="B", help="rows"
    )
    parser.add_argument(
        "--attention", nargs="+", default=["dense", "infllm_v2", "sparda"]
    )
    parser.add_argument(
        "--cache", nargs="+", default=["resident"], choices=["resident", "offload"]
    )
    parser.add_argument(
        "--offloaded",
        nargs="+",
        default=[],
        metavar="ATTENTION",
        help="measured offloaded as well, behind all others",
    )
    parser.add_argument(
        "--together", action="store_true", help="compile all cases side by side"
    )
    add_option(parser, "--layers", count, metavar="L", help="fewer than the preset has")
    parser.add_argument(
        "--agree",
        type=int,
        choices=[1, 2, 4, 8, 16, 32, 64],
        help="instead of a trace: neighbouring tokens that share a list",
    )
    parser.add_argument(
        "--trace",
        type=pathlib.Path,
        default=DEFAULT_TRACE,
        help="whose lists to impose (of `python -m benchmarks.trace`)",
    )
    add_option(
        parser,
        "--tile",
        integer(0),
        many=True,
        default=[0],
        metavar="T",
        help="most query tokens of a tile; 0 is automatic",
    )
    add_option(
        parser, "--repeats", count, default=3, metavar="N", help="timed calls of each"
    )
    add_option(
        parser,
        "--enough",
        number(above=0),
        metavar="SECONDS",
        help="no further timed call of what has been timed for so long",
    )
    parser.add_argument("--parts", action="store_true", help="profile one more call")
    add_option(
        parser,
        "--most",
        integer(0),
        default=16,
        metavar="N",
        help="kernels of the rest",
    )
    add_file_option(parser)
    return parser


def _trace(arguments: argparse.Namespace) -> pathlib.Path | None:
    """The trace to take lists from, unless random weights are to choose."""
    return arguments.trace if arguments.agree is None else None


def _language_model(model, preset, case: "Case", selector):
    """A model that attends as asked, with the given query tiles if there are any."""
    from sparda_jax.config import CacheConfig
    from sparda_jax.engine.model import LanguageModel

    class Tiled(LanguageModel):
        @property
        def tile_size(self) -> int:
            return case.tile

    return (Tiled if case.tile else LanguageModel)(
        model=model,
        config=model.config,
        sparse=preset.sparse,
        selector=selector,
        tokenizer=None,
        fingerprint=None,
        cache=CacheConfig(kind=case.cache),
    )


def keys_read(tokens: int, block_size: int, budget: int | None) -> int:
    """Keys that the tokens of a prompt attend to, each up to itself.

    Args:
      tokens: Of the prompt.
      block_size: Tokens of a block.
      budget: Blocks of a token's list, its own among them; None for all.
    """
    if budget is None:
        return tokens * (tokens + 1) // 2
    whole = min(tokens, budget * block_size)
    keys = whole * (whole + 1) // 2
    # Behind that a token reads budget − 1 whole blocks and its own up to itself.
    full, over = divmod(tokens - whole, block_size)
    keys += (tokens - whole) * (budget - 1) * block_size
    return keys + full * block_size * (block_size + 1) // 2 + over * (over + 1) // 2


def useful_flops(config, sparse, selector, tokens: int) -> dict[str, int]:
    """Floating-point operations of a prompt's products and of its attention.

    The head is left out: it runs for one token.
    """
    from sparda_jax.models.spec import layer_shapes

    weights = sum(
        shape[0] * shape[1]
        for shape in layer_shapes(config).values()
        if len(shape) == 2 and min(shape) > 1
    )
    budget = None if selector.dense else selector.budget(sparse)
    keys = keys_read(tokens, sparse.block_size, budget)
    per_key = 4 * config.num_heads * config.head_dim
    return {
        "products": 2 * tokens * weights * config.num_layers,
        "attention": keys * per_key * config.num_layers,
    }


def matrix_rate(width: int) -> float:
    """FLOP/s of a large product of random matrices; the median of seven."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    left, right = (
        jax.random.normal(jax.random.key(i), (width, width), dtype) for i in range(2)
    )
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        jax.block_until_ready(product(left, right))
        seconds.append(time.perf_counter() - begun)
    return 2 * width**3 / statistics.median(seconds[1:])


def _prefill(lm, tokens: int, batch: int, seed: int):
    """One call; returns its figures, and its seconds without compilation."""
    import numpy as np

    import sparda_jax as sj

    rng = np.random.default_rng(seed)
    rows = [
        rng.integers(10, lm.config.vocab_size, tokens).tolist() for _ in range(batch)
    ]
    begun = time.perf_counter()
    stats = sj.generate(lm, rows, max_new_tokens=1, ignore_eos=True).stats
    return stats, time.perf_counter() - begun - stats.compile_seconds


def _profiled(lm, tokens: int, batch: int, most: int) -> dict:
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _prefill(lm, tokens, batch, 0)
        try:
            return by_part(pathlib.Path(folder), most)
        except ValueError as error:
            raise ConfigError(f"--parts is not possible here: {error}") from error


def _tile(lm, case) -> int:
    """Query tokens of the tiles that a case really runs with."""
    from sparda_jax.inference.shapes import plan_shapes

    return plan_shapes(
        case.context,
        farthest_start=0,
        longest=case.context,
        max_new=1,
        tile_size=lm.tile_size,
        block_size=lm.sparse.block_size,
        batch=case.batch,
    ).tile


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: attention, cache, context, batch and the most of a tile."""

    attention: str
    cache: Any
    context: int
    batch: int
    tile: int


def _first_call(case: Case, model, preset, arguments) -> tuple:
    """A case's language model and the figures of its first call, which compiles."""
    lists = lists_of(_trace(arguments), model.config, preset.sparse, case.batch)
    selector = selector_with(case.attention, arguments.agree, lists)
    lm = _language_model(model, preset, case, selector)
    stats, _ = _prefill(lm, case.context, case.batch, 0)
    return lm, stats


def _over(first: Callable[[Case], Any], case: Case) -> Callable[[], Any]:
    """A case's first call, which is over: what gives or raises what came of it."""
    try:
        got = first(case)
    except Exception as error:
        return functools.partial(_raise, error)
    return lambda: got


def _raise(error: Exception) -> NoReturn:
    raise error


def begin_together(first: Callable[[Case], Any], cases: list[Case]) -> list[Callable]:
    """The first calls of all cases, all over: what gives or raises what came of each.

    The first case is alone: the products' kernels are chosen by timing them, and what
    was chosen serves the others, which are compiled side by side.

    Args:
      first: A case's first call.
      cases: At least one.
    """
    from sparda_jax.engine.compile_cache import side_by_side

    alone = _over(first, cases[0])
    with side_by_side(4) as start:
        others = [start(_over, first, case) for case in cases[1:]]
    return [alone, *(other.result() for other in others)]


def _timed(run: Callable, repeats: int, enough: float | None) -> list[tuple]:
    """What `run` gives for 1, 2, …: figures and seconds of at most `repeats` calls."""
    calls: list[tuple] = []
    while len(calls) < repeats:
        calls.append(run(len(calls) + 1))
        if enough is not None and sum(wall for _, wall in calls) >= enough:
            break
    return calls


def _measure(case: Case, begun: Callable[[], tuple], arguments, rate: float) -> dict:
    """Figures of one case, given what gives its model and first call."""
    import jax

    lm, first = begun()
    run = functools.partial(_prefill, lm, case.context, case.batch)
    calls = _timed(run, arguments.repeats, arguments.enough)
    seconds = [stats.total_seconds for stats, _ in calls]
    median = statistics.median(seconds)
    flops = useful_flops(lm.config, lm.sparse, lm.selector, case.context)
    limit = case.batch * sum(flops.values()) / rate
    memory = jax.devices()[0].memory_stats() or {}
    figures = dataclasses.asdict(case) | {
        "tile": _tile(lm, case),
        "layers": lm.config.num_layers,
        "median_ms": median * 1e3,
        "least_ms": min(seconds) * 1e3,
        "most_ms": max(seconds) * 1e3,
        "calls": len(seconds),
        "tokens_per_second": case.batch * case.context / median,
        "first_token_ms": statistics.median(wall for _, wall in calls) * 1e3,
        "limit_ms": limit * 1e3,
        "limit_share": limit / median,
        "blocks_read": list(first.prefill_blocks),
        "compile_s": first.compile_seconds,
        "peak_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
    }
    if arguments.parts:
        figures["parts"] = _profiled(lm, case.context, case.batch, arguments.most)
    return figures


HEADER = (
    f"{'attention':10} {'cache':8} {'context':>7} {'batch':>5} {'tile':>5} "
    f"{'prefill, ms':>11} {'least':>8} {'most':>8} {'tokens/s':>9} {'layers':>6} "
    f"{'first, ms':>9} "
    f"{'limit, ms':>9} {'reached':>7} {'peak, GB':>8} {'compile, s':>10}"
)


def _line(row: dict) -> str:
    return (
        f"{row['attention']:10} {row['cache']:8} {row['context']:7} {row['batch']:5} "
        f"{row['tile']:5} {row['median_ms']:11.1f} {row['least_ms']:8.1f} "
        f"{row['most_ms']:8.1f} {row['tokens_per_second']:9.0f} {row['layers']:6} "
        f"{row['first_token_ms']:9.1f} "
        f"{row['limit_ms']:9.1f} {row['limit_share']:7.0%} {row['peak_gb']:8.1f} "
        f"{row['compile_s']:10.1f}"
    )


def _print_parts(parts: dict) -> None:
    times = ", ".join(
        f"{part} {parts['milliseconds'][part]:.1f} ms ({count})"
        for part, count in parts["launches"].items()
    )
    print(f"  {times}; busy {parts['busy_ms']:.1f} of {parts['span_ms']:.1f} ms")
    for entry in parts["largest_of_rest"]:
        print(
            f"    {entry['kernel']:60} {entry['milliseconds']:8.2f} ms "
            f"x{entry['launches']}"
        )
    for gap in parts["largest_gaps"]:
        print(
            f"    idle between {gap['behind']} and {gap['before']}: "
            f"{gap['milliseconds']:.2f} ms x{gap['times']}, at most "
            f"{gap['longest_ms']:.2f} ms"
        )


def ratios(rows: list[dict]) -> list[str]:
    """SparDA beside the other attentions, and offloaded beside resident caches."""
    found = {
        (r["context"], r["batch"], r["tile"], r["attention"], r["cache"]): r
        for r in rows
    }
    lines = []
    for (*sizes, attention, cache), row in found.items():
        others = []
        if attention == "sparda":
            others = [("infllm_v2", cache), ("dense", cache)]
        if cache == "offload":
            others.append((attention, "resident"))
        for other, kind in others:
            base = found.get((*sizes, other, kind))
            if base is not None:
                lines.append(
                    f"{sizes[0]} tokens, batch {sizes[1]}: {attention} {cache} is "
                    f"{base['median_ms'] / row['median_ms']:.3f} times as fast as "
                    f"{other} {kind}"
                )
    return lines


def _cases(arguments) -> list[Case]:
    ways = [(a, cache) for cache in arguments.cache for a in arguments.attention]
    extra = [(attention, "offload") for attention in arguments.offloaded]
    return [
        Case(attention, cache, context, batch, tile)
        for context in arguments.context
        for batch in arguments.batch
        for tile in arguments.tile
        for attention, cache in dict.fromkeys([*ways, *extra])
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_offload

    started = time.perf_counter()
    configure_offload()
    import jax

    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.engine.compile_cache import PROGRAMS
    from sparda_jax.models.presets import get_preset
    from sparda_jax.models.weights import random_decoder
    from sparda_jax.sparse.selectors import get_selector

    for name in [*arguments.attention, *arguments.offloaded]:
        get_selector(name)
    preset = get_preset(arguments.model)
    config = preset.shape(arguments.layers, 2 * max(arguments.context))
    cpu = jax.default_backend() == "cpu"
    rate = matrix_rate(1024 if cpu else 8192)
    device = jax.devices()[0].device_kind
    traced = lists_of(_trace(arguments), config, preset.sparse, 1)
    lists = f"{arguments.agree} neighbours share a list"
    if traced is not None:
        lists = traced.source
    print(
        f"{arguments.model}, {config.num_layers} of {preset.model.num_layers} layers, "
        f"random weights, lists: {lists}, {device}, JAX "
        f"{jax.__version__}, {rate / 1e12:.3g} TFLOP/s; the reference published "
        f"{REFERENCE_TOKENS_PER_SECOND} tokens/s (an H100, batch 4, all layers)",
        flush=True,
    )
    dtype = "float32" if cpu else "bfloat16"
    model = random_decoder(config, dtype, forecast=True)
    rows: list[dict] = []
    figures = {
        "device": device,
        "jax": jax.__version__,
        "model": arguments.model,
        "layers": config.num_layers,
        "layers_of_preset": preset.model.num_layers,
        "lists": lists,
        "matrix_flops": rate,
        "reference_tokens_per_second": REFERENCE_TOKENS_PER_SECOND,
        "rows": rows,
    }
    took = {"until_model": time.perf_counter() - started}
    figures["seconds"] = took
    print(HEADER, flush=True)
    cases = _cases(arguments)
    first = functools.partial(
        _first_call, model=model, preset=preset, arguments=arguments
    )
    begun = [functools.partial(first, case) for case in cases]
    if arguments.together:
        begun = begin_together(first, cases)
        took["first_calls"] = time.perf_counter() - started - sum(took.values())
    for case, call in zip(cases, begun, strict=True):
        try:
            rows.append(_measure(case, call, arguments, rate))
        except ConfigError:
            raise
        except Exception as error:  # one case's failure must not hide the others
            print(f"{case} failed: {type(error).__name__}: {str(error)[:300]}")
            continue
        print(_line(rows[-1]), flush=True)
        if "parts" in rows[-1]:
            _print_parts(rows[-1]["parts"])
        took["all"] = time.perf_counter() - started
        if arguments.json:
            write_json(arguments.json, figures)
        if not arguments.together:
            PROGRAMS.clear()
            jax.clear_caches()
    if not rows:
        raise SystemExit("nothing was measured")
    print(*ratios(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
