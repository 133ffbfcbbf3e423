"""`sparda doctor` and `sparda tune`: what serves here and why, and one's own records.

Nothing of JAX is imported before one of them runs.
"""

import argparse
import json
import os
from typing import Any

from sparda_jax.checks import ConfigError
from sparda_jax.cli.options import HelpFormatter

_OPS = (
    "block_scores",
    "block_sparse_attention",
    "choose_blocks",
    "commit_blocks",
    "compress_keys",
    "host_gather",
    "paged_decode_attention",
    "plan_slots",
)


def add_doctor_parser(commands: Any) -> None:
    """Adds `sparda doctor` to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "doctor",
        help="what serves each operation on this machine, and what stands in the way",
        description=(
            "Prints versions, the device, per operation what serves it here and why, "
            "memory kinds and limits, flags, rates, and what costs speed or does not "
            "work. Sends nothing anywhere: paste it into a report yourself."
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--measure", action="store_true", help="measure link and memory (seconds)"
    )
    parser.set_defaults(run=_doctor)


def add_tune_parser(commands: Any) -> None:
    """Adds `sparda tune` to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest kernels and settings of this GPU",
        description=(
            "Compiles, checks and times the kernels' candidates on the GPU at hand "
            "and writes records to the cache directory ($PALLAS_KERNELS_CACHE), where "
            "they come before those of the package. Minutes an operation; a run that "
            "is cut short keeps what it has found."
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"of {', '.join(_OPS)} (all of them)"
    )
    parser.add_argument("--small", action="store_true", help="try the tuner itself")
    parser.set_defaults(run=_tune)


def _doctor(arguments: argparse.Namespace) -> None:
    from sparda_jax.doctor import describe_device

    report = describe_device(measure=arguments.measure)
    print(json.dumps(report.as_json(), indent=1) if arguments.json else report)


def _tune(arguments: argparse.Namespace) -> None:
    unknown = sorted(set(arguments.ops) - set(_OPS))
    if unknown:
        raise ConfigError(f"OP={unknown[0]!r} is not allowed: one of {', '.join(_OPS)}")
    from pallas_kernels.device import (
        current_device_kind,
        current_platform,
        records_directory,
    )
    from pallas_kernels.tuning.main import main as tune

    if current_platform() != "cuda" and not arguments.small:
        raise ConfigError(
            f"device {current_device_kind()!r} is not allowed: kernels are tuned on a "
            "CUDA GPU; XLA alone serves here"
        )
    folder = records_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written: no permission")
    for op in arguments.ops or _OPS:
        tune([op, "--user", *(["--small"] if arguments.small else [])])
