"""`sparda plan`: options, and the plan as a table."""

import argparse
import dataclasses
from typing import Any, get_args

import jax

from pallas_kernels.device import current_device_kind
from sparda_jax.cache.routes import recorded_routes
from sparda_jax.cli.console import HelpFormatter
from sparda_jax.config import (
    OLD_ROUTES,
    CacheConfig,
    ConfigError,
    Route,
    SparseConfig,
)
from sparda_jax.machine import size_text
from sparda_jax.models.presets import get_preset
from sparda_jax.planning.measure import MachineRates, Measured, measure_rates
from sparda_jax.planning.plan import (
    ASSUMED_MISS,
    Option,
    Plan,
    plan,
)
from sparda_jax.planning.rates import Rates, recorded_rates
from sparda_jax.sparse.selectors import selector_names

_EXAMPLES = """\
examples:
  sparda plan --model minicpm4.1-8b --context 131072 --hbm 80 --host 512 \\
              --device-kind "NVIDIA H200"
      on a machine without that GPU, with the rates recorded for it
  sparda plan --model llama-3.1-8b --context 32768 --hbm 24 --host 128 --measure
      measure this machine's link, memory and products first
  sparda plan --model minicpm4.1-8b --context 131072 --hbm 80 --host 512 \\
              --link 25 --bandwidth 1500 --miss 0.05 --batch 32
      another machine: 25 GB/s from host memory, 1,500 GB/s on the device

how to read it:
  Bytes are by part, for --batch and for the largest batch that fits, resident beside
  offloaded. GiB are 2^30 bytes; rates are GB/s, 10^9 bytes a second. A step's time is
  a bound: device bytes over --bandwidth, FLOPs over --peak, fetched bytes over --link,
  the slowest of them with look-ahead, the fetch on top without. --miss is the share of
  listed blocks that is fetched; it depends on model and text, and decides.
"""


def add_plan_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "plan",
        help="what fits in a machine's memory, and whether to offload",
        description=(
            "Plans a deployment without weights and without allocating: device and "
            "host memory by part, the largest batch, expected decode speed, and "
            "whether offloading the KV cache pays."
        ),
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="M", required=True, help="preset name (see sparda models)"
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=int,
        required=True,
        help="tokens of each sequence, prompt and output together",
    )
    parser.add_argument(
        "--hbm", metavar="GiB", type=float, required=True, help="device memory"
    )
    parser.add_argument(
        "--host",
        metavar="GiB",
        type=float,
        required=True,
        help="host memory for KV blocks",
    )
    parser.add_argument(
        "--batch", metavar="B", type=int, default=1, help="sequences at a time"
    )
    parser.add_argument(
        "--attention",
        metavar="A",
        default="sparda",
        help="one of " + ", ".join(selector_names()),
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=256,
        help="of --context, tokens of the output",
    )
    parser.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=int,
        default=8192,
        help="prompt tokens per prefill call; 0 is the whole prompt at once",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    cache = parser.add_argument_group("blocks and slots")
    cache.add_argument(
        "--block-budget", metavar="P", type=int, help="KV blocks read per token"
    )
    cache.add_argument(
        "--local-blocks", metavar="W", type=int, help="blocks before a token's own"
    )
    cache.add_argument("--init-blocks", metavar="I", type=int, help="leading blocks")
    cache.add_argument(
        "--device-blocks",
        metavar="C",
        type=int,
        help="device slots per layer and kv head (a block list's length)",
    )
    cache.add_argument(
        "--prefetch",
        choices=("lookahead", "none"),
        help="look-ahead where the attention forecasts",
    )
    cache.add_argument(
        "--layer0",
        choices=("resident", "offload"),
        default="resident",
        help="where layer 0's KV lives",
    )
    cache.add_argument(
        "--miss",
        metavar="X",
        type=float,
        default=ASSUMED_MISS,
        help="share of listed blocks in no slot (assumed, not measured)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--measure", action="store_true", help="measure this machine's rates"
    )
    machine.add_argument(
        "--route",
        choices=(*get_args(Route), *OLD_ROUTES),
        default="auto",
        help="how blocks are fetched, for --measure",
    )
    machine.add_argument(
        "--device-kind",
        metavar="K",
        help="take the rates recorded for it (this machine's device)",
    )
    machine.add_argument(
        "--link", metavar="GB/s", type=float, help="host to device, of fetched blocks"
    )
    machine.add_argument(
        "--bandwidth", metavar="GB/s", type=float, help="device memory, a copy's"
    )
    machine.add_argument(
        "--peak", metavar="TFLOP/s", type=float, help="matrix products"
    )
    parser.set_defaults(run=run_plan)


def _known_kinds() -> str:
    known = [kind for kind in recorded_routes() if recorded_rates(kind) is not None]
    return ", ".join(repr(kind) for kind in known)


def _rates(arguments: argparse.Namespace, sparse: SparseConfig, head_dim: int) -> Rates:
    """Rates: measured or recorded, and then what was given."""
    if arguments.measure and arguments.device_kind is not None:
        raise ConfigError("--measure is of this machine: leave out --device-kind")
    rates = None
    if arguments.measure:
        measured = measure_rates(
            block_size=sparse.block_size,
            head_dim=head_dim,
            dtype=arguments.dtype,
            route=arguments.route,
        )
        _print_measured(measured)
        rates = measured.rates
    else:
        kind = arguments.device_kind or current_device_kind()
        rates = recorded_rates(kind)
        both = arguments.link is not None and arguments.bandwidth is not None
        if rates is None and (arguments.device_kind is not None or not both):
            raise ConfigError(
                f"no rates are recorded for device kind {kind!r}: give --link and "
                "--bandwidth (GB/s), or --measure this machine, or --device-kind with "
                f"one of {_known_kinds()}"
            )
    link = _given(arguments, "link", 1e9)
    bandwidth = _given(arguments, "bandwidth", 1e9)
    peak = _given(arguments, "peak", 1e12)
    if rates is None:
        assert link is not None and bandwidth is not None
        return Rates(memory=bandwidth, fetch=link, peak=peak)
    if link is bandwidth is peak is None:
        return rates
    return dataclasses.replace(
        rates,
        fetch=link or rates.fetch,
        memory=bandwidth or rates.memory,
        peak=peak or rates.peak,
        source=f"{rates.source}, with what was given",
    )


def _given(arguments: argparse.Namespace, option: str, scale: float) -> float | None:
    value = getattr(arguments, option)
    if value is None:
        return None
    if not 0 < value < 1e9:
        raise ConfigError(f"--{option}={value} is not allowed: it must be above 0")
    return value * scale


def run_plan(arguments: argparse.Namespace) -> None:
    """Runs the subcommand."""
    preset = get_preset(arguments.model)
    names = ("block_budget", "local_blocks", "init_blocks")
    changed = {name: getattr(arguments, name) for name in names}
    sparse = dataclasses.replace(
        preset.sparse,
        **{name: value for name, value in changed.items() if value is not None},
    )
    if arguments.dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"--dtype={arguments.dtype!r} is not allowed: it must be 'float32', "
            "'bfloat16' or 'float16'"
        )
    rates = _rates(arguments, sparse, preset.model.head_dim)
    result = plan(
        arguments.model,
        context=arguments.context,
        hbm_gib=arguments.hbm,
        host_gib=arguments.host,
        rates=rates,
        batch=arguments.batch,
        attention=arguments.attention,
        sparse=sparse,
        cache=CacheConfig(
            kind="offload",
            device_blocks=arguments.device_blocks,
            prefetch=arguments.prefetch,
            layer0=arguments.layer0,
        ),
        miss=arguments.miss,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        prefill_chunk=arguments.prefill_chunk or None,
    )
    print(plan_text(result))


def _print_measured(found: MachineRates) -> None:
    def line(name: str, rate: Measured, scale: float, unit: str) -> None:
        print(f"  {name:26} {rate.rate / scale:10,.4g} {unit:9} ±{rate.spread:.0%}")

    print(f"measured on {found.device}, JAX {found.jax}, medians of 7 calls")
    line("link, one large copy", found.link, 1e9, "GB/s")
    block = f"fetch, {found.route}, {found.block_bytes // 1024} KiB"
    line(block, found.fetch, 1e9, "GB/s")
    line("device copy", found.memory, 1e9, "GB/s")
    line("matrix product", found.products, 1e12, "TFLOP/s")
    print()


def _gb(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}"


def plan_text(result: Plan) -> str:
    """The plan as text."""
    rates, sparse = result.rates, result.sparse
    lines = [
        f"{result.model.name}, {result.attention}, {result.dtype}: {result.context:,} "
        f"tokens a sequence ({result.prompt:,} of prompt, {result.chunk:,} a prefill "
        "call)",
        f"{sparse.block_budget} of {-(-result.context // sparse.block_size):,} blocks "
        f"a token; limits {_limit(result)}",
        f"memory {_gb(rates.memory)} GB/s, fetch {_gb(rates.fetch)} GB/s"
        + (f" (link {_gb(rates.link)})" if rates.link else "")
        + (f", {rates.peak / 1e12:,.3g} TFLOP/s" if rates.peak else "")
        + f"; {rates.source}; JAX {jax.__version__} here",
        f"assumed: {result.miss:.1%} of listed blocks are fetched",
        "",
    ]
    columns: list[tuple[str, Option]] = [
        ("resident", result.resident),
        ("offload", result.offload),
    ]
    for name, best in (
        ("resident", result.resident_best),
        ("offload", result.offload_best),
    ):
        if best is not None and best.batch != result.batch:
            columns.append((f"{name}, most", best))
    lines += _table(columns)
    alone = result.offload_alone
    if result.lookahead and alone is not None:
        lines += [
            "",
            f"without look-ahead, batch {alone.batch} offloaded takes at best "
            f"{alone.step.seconds * 1e3:.1f} ms a step ({alone.tokens_per_second:,.0f} "
            "tokens/s)",
        ]
    lines += ["", f"verdict: {result.verdict}"]
    if result.break_even is None:
        lines.append("at this context offload is ahead at no miss share")
    elif result.break_even >= 1:
        lines.append("at this context offload is ahead at any miss share")
    else:
        lines.append(
            f"at this context offload is ahead up to {result.break_even:.1%} misses"
        )
    if result.pays_from is None:
        lines.append(f"offload pays at no context (at {result.miss:.1%} misses)")
    else:
        lines.append(
            f"offload starts to pay at {result.pays_from:,} tokens a sequence (at "
            f"{result.miss:.1%} misses)"
        )
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def _limit(result: Plan) -> str:
    limits = result.limits
    found = [limit.source for limit in (limits.device, limits.host) if limit]
    return ", ".join(found)


def _table(columns: list[tuple[str, Option]]) -> list[str]:
    width = 16
    names: list[str] = []
    # The widest points of two columns may differ: a part takes its first place.
    for _, option in columns:
        at = 0
        for name, _ in option.memory.parts():
            if name in names:
                at = names.index(name) + 1
            else:
                names.insert(at, name)
                at += 1

    def row(name: str, values: list[str]) -> str:
        return f"{name:30}" + "".join(f"{value:>{width}}" for value in values)

    parts = [dict(option.memory.parts()) for _, option in columns]
    options = [option for _, option in columns]
    lines = [
        row("", [name for name, _ in columns]),
        row("batch", [f"{option.batch:,}" for option in options]),
        *(
            row(name, [size_text(p[name]) if name in p else "–" for p in parts])
            for name in names
        ),
        row("device, at its widest", [size_text(o.memory.device) for o in options]),
        row(
            "host store",
            [size_text(o.memory.host) if o.memory.host else "–" for o in options],
        ),
        row("fits", ["yes" if o.fits else "no" for o in options]),
        row(
            "decode step, at best", [f"{o.step.seconds * 1e3:.1f} ms" for o in options]
        ),
        row("  waits for", [o.step.bound_by for o in options]),
        row("tokens/s, at most", [f"{o.tokens_per_second:,.0f}" for o in options]),
    ]
    return lines
