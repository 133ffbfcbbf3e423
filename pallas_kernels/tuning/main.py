"""Finds settings on the device at hand: ``python -m pallas_kernels.tuning <op>``.

For every case and implementation, each candidate is compiled, its result compared with
the XLA form, and timed. With ``--write`` the record goes to
``tuned/<device>/<op>.json``: the fastest settings by case, and the implementations that
were right and faster than XLA as the default order. It is written after each
implementation of a case, so that a run cut short leaves what it has found, and says
under ``unfinished`` what is missing. ``--implementation`` and ``--case`` take that up;
entries of other cases stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels._common.cache import cache_directory, write_json
from pallas_kernels._common.command import Parser
from pallas_kernels._common.devices import current_device_kind, device_slug
from pallas_kernels.dispatch import IMPLEMENTATIONS, TUNED
from pallas_kernels.tuning.cases import CASES
from pallas_kernels.tuning.record import merged
from pallas_kernels.tuning.search import tune


def _sizes(text: str) -> dict[str, int]:
    """ "B=64,K=2" as a dict."""
    pairs = (part.split("=") for part in text.split(","))
    try:
        return {name: int(value) for name, value in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be sizes of a case, as in B=64,K=2"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tuner from the command line."""
    parser = Parser("python -m pallas_kernels.tuning", description=__doc__)
    parser.add_argument("op", choices=sorted(CASES))
    parser.add_argument("--small", action="store_true", help="try the tuner itself")
    parser.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--out", type=Path, help="write it to this folder instead")
    parser.add_argument(
        "--user",
        action="store_true",
        help="write it to the user's cache directory, where it is found first",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        default=(),
        choices=[name for name in IMPLEMENTATIONS if name != "xla"],
        help="only these",
    )
    parser.add_argument(
        "--case", nargs="+", default=(), type=_sizes, help="only these, as in B=64"
    )
    args = parser.parse_args(argv)
    tuned = cache_directory() / "tuned" if args.user else TUNED
    folder = args.out or tuned / device_slug(current_device_kind())
    path = folder / f"{args.op}.json"
    old: dict[str, Any] = {}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))

    def write(record: Mapping[str, Any]) -> None:
        if not (args.write or args.out or args.user):
            return
        write_json(path, merged(old, record, bool(args.implementation or args.case)))

    record = tune(
        args.op,
        args.small,
        implementations=args.implementation,
        only=args.case,
        on_progress=write,
    )
    write(record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
