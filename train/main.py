"""`python -m train.main --config configs/NAME.py [--set key=value …]`: one run.

A run that was interrupted continues when the same command is given again.
"""

import argparse
import dataclasses
import json
import sys

from sparda_jax.cli.starting import interrupt_ends

with interrupt_ends("sparda: interrupted"):
    from sparda_jax.cli.packages import command_needs

    with command_needs("train", __name__):
        from sparda_jax.hosts import join_hosts
        from train.command import run_command
        from train.config import load_config, with_overrides
        from train.options import build_parser
        from train.run import train


def main(arguments: list[str] | None = None) -> int:
    """Entry point; also behind `sparda train`."""
    return run_command(
        lambda: _run(build_parser(__doc__).parse_args(arguments)),
        interrupted=": the checkpoints are whole, and the same command continues",
    )


def _run(options: argparse.Namespace) -> None:
    config = with_overrides(load_config(options.config), options.set)
    if options.print:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    join_hosts(options.coordinator, options.num_processes, options.process_id)
    result = train(config, progress=not options.quiet)
    print(f"{result.forecast}: step {int(result.state.step)}")
    if result.evaluation is not None:
        for name, value in result.evaluation.means().items():
            shown = "not measured" if value is None else f"{value:.4f}"
            print(f"  held-out {name.replace('_', ' ')}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
