"""The `sparda` command: its parser, and how a run ends."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

import sparda_jax as sj
from sparda_jax.cli.chat import add_chat_parser
from sparda_jax.cli.completion import add_completion_parser
from sparda_jax.cli.console import note
from sparda_jax.cli.demo import add_demo_parser
from sparda_jax.cli.doctor import add_doctor_parser, add_tune_parser
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.eval import add_eval_parser, add_report_parser
from sparda_jax.cli.export import add_export_parsers
from sparda_jax.cli.fetch import add_fetch_parser
from sparda_jax.cli.forecast_report import add_forecast_report_parser
from sparda_jax.cli.generate import EXAMPLES, add_generate_parser
from sparda_jax.cli.models import add_models_parser
from sparda_jax.cli.options import HelpFormatter, Parser
from sparda_jax.cli.plan import add_plan_parser
from sparda_jax.cli.serve import add_serve_parser
from sparda_jax.cli.soak import add_soak_parser
from sparda_jax.cli.starting import interrupt_ends


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each one's `run` is set by its module."""
    parser = Parser(
        prog="sparda",
        description="Long-context generation with SparDA's Forecast-driven attention.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    version = f"%(prog)s {sj.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_generate_parser(commands)
    add_chat_parser(commands)
    add_serve_parser(commands)
    add_plan_parser(commands)
    add_eval_parser(commands)
    add_report_parser(commands)
    add_doctor_parser(commands)
    add_tune_parser(commands)
    add_models_parser(commands)
    add_fetch_parser(commands)
    add_forecast_report_parser(commands)
    add_export_parsers(commands)
    # Only listed here: `main` hands their arguments over as they are.
    for name, (about, _) in _ABOVE.items():
        commands.add_parser(name, add_help=False, help=about)
    add_demo_parser(commands)
    add_soak_parser(commands)
    add_completion_parser(commands, build_parser)
    return parser


# Commands of the packages above this one: what they do, and what is to be installed.
_ABOVE = {
    "train": (
        "distil Forecast heads (sparda train --help; needs sparda-jax[train])",
        "sparda-jax[train]",
    ),
    "adapt": (
        "make Forecast heads for a model (sparda adapt --help; needs "
        "sparda-jax[train])",
        "sparda-jax[train]",
    ),
    "bench": (
        "measure prefill, decode and link (sparda bench --help)",
        "sparda-jax",
    ),
}


def _above(name: str, argv: Sequence[str]) -> int:
    """Hands over to a package above this one, which this package does not import.

    It is found by its entry point, as any package above this one may be.
    """
    found = importlib.metadata.entry_points(group="sparda.commands", name=name)
    problem = f"the command {name} is not installed"
    for entry in found:
        try:
            with interrupt_ends("sparda: interrupted"):
                run: Callable[[list[str]], int] = entry.load()
        except ImportError as error:
            problem = f"a package is missing ({error.name})"
            break
        return run(list(argv))
    note(f"sparda: {name}: {problem}: pip install '{_ABOVE[name][1]}'")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Bad input ends in one line on standard error and status 2, never in a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _ABOVE:
        return _above(argv[0], argv[1:])

    def action() -> None:
        arguments = build_parser().parse_args(argv)
        # Before JAX starts: on a GPU a fetch overlaps with compute only under these
        # flags.
        sj.configure_offload()
        arguments.run(arguments)

    return run_command(action, prefix="sparda: ")
