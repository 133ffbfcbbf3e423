"""The options that say how tokens are drawn, and where an output ends."""

import argparse
from typing import Any

from sparda_jax.checks import integer, non_empty_text
from sparda_jax.cli.options import add_option
from sparda_jax.inference.sampling import MOST_SEED, SAMPLING_CHECKS, SamplingConfig


def add_seed_option(parser: Any, help: str, default: int = 0) -> None:
    """Adds --seed; `help` says of what."""
    add_option(
        parser,
        "--seed",
        integer(0, MOST_SEED),
        metavar="N",
        default=default,
        help=help,
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `sampling_values` reads."""
    add_option(
        parser,
        "--max-new-tokens",
        integer(1),
        metavar="N",
        default=128,
        help="most tokens",
    )
    for name, metavar, help in (
        ("temperature", "X", "0 is greedy"),
        ("top_k", "K", "K best tokens; 0 is off"),
        ("top_p", "P", "nucleus; 1 is off"),
        ("min_p", "P", "least probability, relative to the best token's; 0 is off"),
        ("repetition_penalty", "X", "1 is off"),
    ):
        add_option(
            parser,
            "--" + name.replace("_", "-"),
            SAMPLING_CHECKS[name],
            metavar=metavar,
            default=getattr(SamplingConfig(), name),
            help=help,
        )
    add_seed_option(parser, "of sampling")
    add_option(
        parser,
        "--stop",
        non_empty_text,
        metavar="TEXT",
        repeated=True,
        help="end the output before this text; may be repeated",
    )
    add_option(
        parser,
        "--stop-id",
        integer(0),
        metavar="ID",
        repeated=True,
        help="a further token id that ends the output; may be repeated",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on past the end-of-text token"
    )


def sampling_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `GenerateConfig` that the options give."""
    return {
        "max_new_tokens": arguments.max_new_tokens,
        **{name: getattr(arguments, name) for name in SAMPLING_CHECKS},
        "seed": arguments.seed,
        "stop": arguments.stop,
        "stop_ids": arguments.stop_id,
        "ignore_eos": arguments.ignore_eos,
    }
