"""`sparda plan`: options, and the plan as a table."""

import argparse
import dataclasses
from typing import Any

from pallas_kernels.device import current_device_kind
from sparda_jax.checks import (
    FLOAT_DTYPES,
    ConfigError,
    choice,
    integer,
    number,
    path,
    shown,
    text,
)
from sparda_jax.cli.cache_options import (
    add_codec_option,
    add_device_blocks_option,
    add_layer0_option,
    add_lookahead_option,
    add_route_option,
)
from sparda_jax.cli.model_options import (
    add_attention_option,
    add_block_options,
    add_mesh_option,
    with_blocks,
)
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.cli.plan_text import plan_text
from sparda_jax.config import CacheConfig, SparseConfig
from sparda_jax.planning.measure import MachineRates, Measured, measure_rates
from sparda_jax.planning.plan import plan
from sparda_jax.planning.rates import Rates, recorded_kinds, recorded_rates
from sparda_jax.planning.shape import named_shape

_EXAMPLES = """\
examples:
  sparda plan --model minicpm4.1-8b --context 131072 --hbm 80 --host 512 \\
              --device-kind H200
      on a machine without that GPU, with the rates recorded for it
  sparda plan --model llama-3.1-8b --context 32768 --hbm 24 --host 128 --measure
      measure this machine's link, memory and products first
  sparda plan --model minicpm4.1-8b --context 131072 --hbm 80 --host 512 \\
              --link 25 --bandwidth 1500 --miss 0.05 --batch 32
      another machine: 25 GB/s from host memory, 1,500 GB/s on the device

how to read it:
  Bytes are by part, for --batch and for the batch of most tokens/s that fits, resident
  beside offloaded. GiB are 2^30 bytes; rates are GB/s, 10^9 bytes a second. A step's
  time is device bytes over --bandwidth, FLOPs over --peak, fetched bytes over --link,
  the slowest of them with look-ahead, the fetch on top without, and what a layer was
  recorded to take beside them; on a device without that record, a bound. --miss is
  the share of listed blocks that is fetched; it depends on model, text and slots, and
  decides. Without it a curve of a real model over a real text gives it for
  --device-blocks.
"""


def add_plan_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "plan",
        help="what fits in a machine's memory, and whether to offload",
        description=(
            "Plans a deployment without weights and without allocating: device and "
            "host memory by part, the best batch, expected decode speed, and "
            "whether offloading the KV cache pays."
        ),
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_request_options(parser)
    _add_slot_options(parser.add_argument_group("blocks and slots"))
    _add_machine_options(parser.add_argument_group("machine"))
    parser.set_defaults(run=run_plan)


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    size = number(above=0, most=2**30)
    add_option(
        parser,
        "--model",
        path,
        metavar="M",
        required=True,
        help="preset name, GGUF file, directory with a config.json, or hub id",
    )
    add_option(
        parser,
        "--context",
        integer(1),
        metavar="N",
        required=True,
        help="tokens of each sequence, prompt and output together",
    )
    add_option(
        parser, "--hbm", size, metavar="GiB", required=True, help="device memory"
    )
    add_option(
        parser,
        "--host",
        size,
        metavar="GiB",
        required=True,
        help="host memory for KV blocks",
    )
    add_option(
        parser,
        "--batch",
        integer(1),
        metavar="B",
        default=1,
        help="sequences at a time",
    )
    add_attention_option(parser, default="sparda")
    _add_size_options(parser)


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "--max-new-tokens",
        integer(1),
        metavar="N",
        default=256,
        help="of --context, tokens of the output",
    )
    add_option(
        parser,
        "--prefill-chunk",
        integer(0),
        metavar="N",
        default=8192,
        help="prompt tokens per prefill call; 0 is the whole prompt at once",
    )
    add_option(
        parser,
        "--dtype",
        choice(*FLOAT_DTYPES),
        words=FLOAT_DTYPES,
        default="bfloat16",
        help="of weights and cache",
    )


def _add_slot_options(group: Any) -> None:
    add_block_options(group)
    add_device_blocks_option(group, default="auto")
    add_lookahead_option(group)
    add_layer0_option(group)
    add_codec_option(group)
    add_option(
        group,
        "--miss",
        number(least=0, most=1),
        metavar="X",
        help="share of listed blocks in no slot (by the slots, from a trace)",
    )
    add_option(
        group,
        "--trace",
        path,
        metavar="FILE",
        help="block trace to take the misses from (the published one)",
    )


def _add_machine_options(group: Any) -> None:
    rate = number(above=0, most=1e9)
    group.add_argument(
        "--measure", action="store_true", help="measure this machine's rates"
    )
    add_route_option(group, "how blocks are fetched, for --measure")
    add_mesh_option(group)
    add_option(
        group,
        "--device-kind",
        text,
        metavar="K",
        help="take the rates recorded for it, as H200 (this machine's device)",
    )
    add_option(
        group,
        "--link",
        rate,
        metavar="GB/s",
        help="host to device, of fetched blocks",
    )
    add_option(
        group,
        "--bandwidth",
        rate,
        metavar="GB/s",
        help="device memory, a copy's",
    )
    add_option(group, "--peak", rate, metavar="TFLOP/s", help="matrix products")


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
                f"no rates are recorded for device kind {shown(kind)}: give --link and "
                "--bandwidth (GB/s), or --measure this machine, or --device-kind with "
                f"one of {', '.join(map(repr, recorded_kinds()))}, of which a word "
                "that no other has will do"
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
    return None if value is None else value * scale


def run_plan(arguments: argparse.Namespace) -> None:
    """Runs the subcommand."""
    config, base = named_shape(arguments.model)
    sparse = with_blocks(base, arguments)
    rates = _rates(arguments, sparse, config.head_dim)
    result = plan(
        config,
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
            codec=arguments.host_codec,
        ),
        miss=arguments.miss,
        trace=arguments.trace,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        prefill_chunk=arguments.prefill_chunk or None,
        mesh=arguments.mesh,
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
