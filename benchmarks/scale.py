"""What many hosts would give, computed: the planner's step and the sums between cards.

    python -m benchmarks.scale --model llama-3.1-70b --context 131072 --cards 4 8

Nothing is measured here. A card's step is `sparda plan`'s, with recorded rates. Each
layer adds two all-reduces of [rows, D] over the cards of a group, each of which takes

    latency + 2 (n - 1) / n x bytes / bandwidth

(a ring's bytes). Groups and hosts have rows of their own and exchange nothing, so that
their tokens/s add up. Host memory is divided among the cards of a host, and is taken to
feed all their links at once.
"""

import argparse
import sys

import jax.numpy as jnp

from sparda_jax.checks import ConfigError, integer, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import Parser, add_option
from sparda_jax.mesh import MeshConfig
from sparda_jax.planning.plan import Option, Plan, plan
from sparda_jax.planning.rates import recorded_kinds, recorded_rates
from sparda_jax.planning.shape import named_shape

HOSTS = (1, 2, 4, 8, 16, 32, 64)


def sums_seconds(
    layers: int, rows: int, hidden: int, cards: int, latency: float, bandwidth: float
) -> float:
    """Seconds of a decode step's all-reduces, one after the other.

    Args:
      layers, rows, hidden: Of the model and the batch.
      cards: That share a layer.
      latency: Seconds of the smallest all-reduce.
      bandwidth: Bytes a second that a card sends.
    """
    if cards == 1:
        return 0.0
    sent = 2 * (cards - 1) / cards * rows * hidden * jnp.dtype("bfloat16").itemsize
    return 2 * layers * (latency + sent / bandwidth)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    above = number(above=0)
    parser.add_argument("--model", default="llama-3.1-70b", help="preset")
    for name, check, usual, unit, about in (
        ("--context", integer(1), 131072, "N", "tokens of a row"),
        ("--host-cards", integer(1), 8, "N", "cards of a host"),
        ("--hbm", above, 80.0, "GiB", "memory of a card"),
        ("--host", above, 1024.0, "GiB", "memory of a host, for KV"),
        ("--sum-us", above, 19.0, "US", "microseconds of the smallest all-reduce"),
        ("--sum-rate", above, 350.0, "GB/s", "that a card sends in an all-reduce"),
    ):
        add_option(parser, name, check, metavar=unit, default=usual, help=about)
    parser.add_argument(
        "--cards", type=int, nargs="+", default=[4, 8], help="of a group: model=N"
    )
    parser.add_argument("--device-kind", default="H100", help="whose rates to take")
    return parser


def _step(found: Plan, option: Option, cards: int, arguments) -> tuple[float, float]:
    """Milliseconds of a group's step, to a hundredth, and the share of its sums."""
    config = found.model
    sums = sums_seconds(
        config.num_layers,
        option.batch,
        config.hidden_size,
        cards,
        arguments.sum_us * 1e-6,
        arguments.sum_rate * 1e9,
    )
    step = option.step.seconds + sums
    return round(step * 1e3, 2), sums / step


def _cells(found: Plan, option: Option | None, cards: int, arguments) -> str:
    """Rows, step and share of the sums of one group."""
    if option is None:
        return f"{'none fits':>24}"
    step, share = _step(found, option, cards, arguments)
    return f"{option.batch:6} {step:9.2f} {share:7.0%}"


def _tokens(found: Plan, option: Option | None, cards: int, arguments) -> float:
    """Tokens a second of one group, of the step as it is printed."""
    if option is None:
        return 0.0
    step, _ = _step(found, option, cards, arguments)
    return option.batch / step * 1e3


def _run(arguments: argparse.Namespace) -> None:
    config, sparse = named_shape(arguments.model)
    rates = recorded_rates(arguments.device_kind)
    if rates is None:
        kinds = ", ".join(recorded_kinds())
        raise ConfigError(f"--device-kind={arguments.device_kind!r}: one of {kinds}")
    print(f"computed, not measured: {arguments.model}, {arguments.context} tokens,")
    print(f"{arguments.device_kind}: {rates.source}")
    for cards in arguments.cards:
        share = arguments.host * cards / arguments.host_cards
        found = plan(
            config,
            context=arguments.context,
            hbm_gib=arguments.hbm,
            host_gib=share,
            rates=rates,
            sparse=sparse,
            mesh=MeshConfig(model=cards),
        )
        print(f"\n{cards} cards a group: {'rows':>11} {'step, ms':>9} {'sums':>7}")
        for name, option in (
            ("resident", found.resident_best),
            ("offloaded", found.offload_best),
        ):
            print(f"  {name:16} {_cells(found, option, cards, arguments)}")
        groups = arguments.host_cards // cards
        print(f"  {'hosts':>5} {'cards':>5} {'resident, tok/s':>16} {'offloaded':>10}")
        for hosts in HOSTS:
            rate = [
                hosts * groups * _tokens(found, option, cards, arguments)
                for option in (found.resident_best, found.offload_best)
            ]
            all_cards = hosts * arguments.host_cards
            print(f"  {hosts:5} {all_cards:5} {rate[0]:16,.0f} {rate[1]:10,.0f}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
