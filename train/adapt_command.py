"""The command `sparda adapt`; see `train.adapt`."""

import argparse
import dataclasses
import sys
from typing import Any

from sparda_jax.checks import choice, integer, number
from sparda_jax.checks import path as check_path
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.cli.packages import command_needs

with command_needs("train", __name__):
    from train.adapt import AdaptConfig, run_adapt
    from train.adapt_card import told
    from train.command import run_command

_EXAMPLES = """\
examples:
  sparda adapt --model smollm2-135m --minutes 5 --out heads.safetensors
      on Python's own code and manual
  sparda adapt --model model.gguf --text ./documents --seq-len 32768 --minutes 30 \\
      --out heads.safetensors

It measures windows and budget, fits the heads by regression, distils them for the time
given, measures them on text that it held out, and writes the heads, a card (.md), a
plot (.png) and all figures (.json). The last line says whether the model is fit for
sparse attention; status 1 if not. The same command goes on after an interruption.
  sparda generate --model model.gguf --attention sparda --forecast heads.safetensors
takes the heads with their windows and budget.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = Parser(
        prog="sparda adapt",
        description="Makes Forecast heads for a model.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    default = {field.name: field.default for field in dataclasses.fields(AdaptConfig)}
    add_option(
        parser,
        "--model",
        check_path,
        metavar="M",
        required=True,
        help="a preset, GGUF file, safetensors directory or hub id",
    )
    add_option(
        parser,
        "--out",
        check_path,
        metavar="FILE",
        required=True,
        help="the heads, .safetensors",
    )
    add_option(
        parser,
        "--text",
        check_path,
        metavar="SOURCE",
        repeated=True,
        help="a file or directory of text, 'stdlib' or 'pydoc'; may be given several "
        "times (both of Python's if not given)",
    )
    for name, check, metavar, about in (
        ("minutes", number(above=0, most=1e5), "N", "of distillation"),
        ("steps", integer(1), "N", "of it, instead of minutes: repeatable by the seed"),
        ("seq-len", integer(1), "T", "tokens of a row (16,384; 2,048 on a CPU)"),
        ("budget", integer(4), "P", "blocks a token reads; measured if not given"),
        ("kernel-size", integer(2), "N", "tokens of a window; measured if not given"),
        ("least-mass", number(least=0, most=1), "X", "attention that blocks capture"),
        ("queries", integer(1), "R", "of the heads a kv head (as many as query heads)"),
        ("reads", choice("input", "attended"), "R", "attended: behind attention"),
        ("rank", integer(1), "N", "of the file's matrices"),
        ("init-batches", integer(1), "N", "rows of the regression"),
        ("passkeys", integer(0), "N", "that are asked for at the end"),
        ("dtype", choice("float32", "bfloat16"), "D", "float32 or bfloat16"),
        ("seed", integer(0), "N", "of everything"),
    ):
        add_option(
            parser,
            f"--{name}",
            check,
            metavar=metavar,
            default=default[name.replace("-", "_")],
            help=about,
        )
    parser.add_argument(
        "--whole", action="store_true", help="whole matrices in the file, no rank"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `sparda adapt`."""
    return run_command(
        lambda: _run(build_parser().parse_args(arguments)),
        interrupted=": the same command continues",
    )


def _run(options: argparse.Namespace) -> None:
    names = {field.name for field in dataclasses.fields(AdaptConfig)}
    values: dict[str, Any] = {k: v for k, v in vars(options).items() if k in names}
    values["text"] = tuple(options.text)
    if options.whole:
        values["rank"] = None
    asked = AdaptConfig(**values)
    result = run_adapt(asked, progress=not options.quiet)
    held = result.figures["held_out"]
    print(
        f"{result.heads}: recall {held['recall']:.3f}, at budget "
        f"{held['recall_at_budget']:.3f}, mass {held['forecast_mass']:.3f} (own query "
        f"{held['own_mass']:.3f}, oracle {held['oracle_mass']:.3f}); card {result.card}"
    )
    print(told(result.figures))
    if not result.fit:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
