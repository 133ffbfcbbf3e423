"""`sparda soak`: random requests for as long as asked, some checked, memory flat."""

import argparse
import dataclasses
import json
import sys
from typing import Any, get_args

from sparda_jax.checks import ConfigError, choice, integer, number
from sparda_jax.cli.cache_options import (
    add_layer0_option,
    add_lookahead_option,
    add_route_option,
)
from sparda_jax.cli.console import note
from sparda_jax.cli.live import LiveLine
from sparda_jax.cli.model_options import add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.cli.sampling_options import add_seed_option
from sparda_jax.config import CacheConfig
from sparda_jax.evaluation.soak import SoakReport, sizes_of, soak
from sparda_jax.machine import size_text
from sparda_jax.models.decoder import Storage

_EXAMPLES = """\
examples:
  sparda soak --minutes 10
      the default model, with its KV in host memory
  sparda soak --model tiny --forecast from_query --attention sparda --minutes 1
      a tiny random model, where no file is needed
  sparda soak --model tiny --forecast from_query --attention sparda --new 400 \\
      --tokens 100000 --minutes 60
      a hundred thousand tokens decoded, most of them in long outputs
  sparda soak --minutes 10 --seed 3 --only 41
      one request of that run again, checked

exit status: 0 if all held, 1 if something did not, 2 for bad input.
"""


def add_soak_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "soak",
        help="random requests with offloaded KV: same tokens, flat memory",
        description=(
            "Runs random requests (lengths, budgets, sampling, early stops, "
            "cancellations, further turns) with the KV cache in host memory. Every "
            "n-th is compared with a resident cache, token for token; after the "
            "warm-up nothing may be compiled and no memory may be kept."
        ),
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_model_options(parser, mesh=False)
    add_option(
        parser,
        "--minutes",
        number(above=0, most=100_000),
        metavar="N",
        default=5,
        help="how long, after the warm-up",
    )
    add_option(
        parser, "--requests", integer(1), metavar="N", help="most requests as well"
    )
    add_option(
        parser, "--tokens", integer(1), metavar="N", help="most output tokens as well"
    )
    add_option(
        parser,
        "--new",
        integer(4),
        metavar="N",
        default=24,
        help="output tokens of a row and turn",
    )
    add_option(
        parser,
        "--context",
        integer(64),
        metavar="N",
        default=1024,
        help="most tokens of a prompt",
    )
    add_option(
        parser,
        "--check-every",
        integer(1),
        metavar="N",
        default=5,
        help="compare every n-th answer with a resident cache",
    )
    add_seed_option(parser, "of all requests")
    add_option(
        parser,
        "--only",
        integer(0),
        metavar="N",
        help="run the request of this number alone",
    )
    add_option(
        parser,
        "--device-blocks",
        integer(1),
        metavar="C",
        help="device slots per layer and kv head (the block budget)",
    )
    add_lookahead_option(parser)
    add_option(
        parser,
        "--storage",
        choice(*get_args(Storage)),
        words=get_args(Storage),
        default="stacked",
        help="of the layers: per_layer is what generate runs, and takes several times "
        "as long to compile",
    )
    add_layer0_option(parser)
    add_route_option(parser, "how blocks are fetched")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_soak, attention="sparda")


def _soak(arguments: argparse.Namespace) -> None:
    lm = load_model(arguments, arguments.attention, arguments.storage)
    most = lm.config.max_context - 2 * arguments.new - 64
    if most < 64:
        raise ConfigError(
            f"--new={arguments.new} is not allowed: it must be at most "
            f"{(lm.config.max_context - 128) // 2} for model {lm.config.name!r}, whose "
            "context holds a prompt and two turns"
        )
    if arguments.context > most:
        raise ConfigError(
            f"--context={arguments.context} is not allowed: it must be at most {most} "
            f"for model {lm.config.name!r}, further turns included"
        )
    cache = CacheConfig(
        kind="offload",
        device_blocks=arguments.device_blocks,
        prefetch=arguments.prefetch,
        layer0=arguments.layer0,
        route=arguments.route,
    )
    if arguments.only is None:
        note(
            "soak: warming up: compiles every size, offloaded and resident, which "
            "may take minutes the first time (--minutes begins after it)"
        )
    with LiveLine() as line:
        report = soak(
            dataclasses.replace(lm, cache=cache),
            dataclasses.replace(lm, cache=CacheConfig()),
            sizes_of(lm, arguments.context, arguments.new),
            seed=arguments.seed,
            seconds=float(arguments.minutes * 60),
            requests=arguments.requests,
            tokens=arguments.tokens,
            only=arguments.only,
            check_every=arguments.check_every,
            on_request=lambda report: line.show(_live(report)) if line.due() else None,
        )
    print(json.dumps(dataclasses.asdict(report)) if arguments.json else _text(report))
    if report.problems:
        sys.stdout.flush()
        for problem in report.problems:
            note(f"soak: {problem} (--seed {arguments.seed})")
        raise SystemExit(1)


def _live(report: SoakReport) -> str:
    return (
        f"{report.requests} requests, {report.tokens} tokens, "
        f"{report.checked} checked, {report.seconds:.0f} s, "
        f"{size_text(report.live_bytes[1])} of arrays"
    )


def _text(report: SoakReport) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    lines = [
        f"requests  {report.requests} after {report.warm_up} to warm up ({kinds}), "
        f"{report.tokens} tokens in {report.seconds:.0f} s",
        f"checked   {report.checked} against a resident cache",
        f"compiled  {report.compiled} programs after the warm-up",
        "arrays    " + " before, ".join(map(size_text, report.live_bytes)) + " now",
    ]
    if report.rss_bytes is not None:
        lines.append(
            "process   " + " before, ".join(map(size_text, report.rss_bytes)) + " now"
        )
    return "\n".join(lines)
