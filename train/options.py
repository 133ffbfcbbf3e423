"""The options of `sparda train`, without what a run imports."""

import argparse

from sparda_jax.cli.options import Parser, add_hosts_options


def build_parser(about: str | None = None) -> argparse.ArgumentParser:
    """The command's parser; `about` is what its help begins with."""
    parser = Parser("python -m train.main", description=about)
    parser.add_argument("--config", required=True, help="Python file with get_config()")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, e.g. lr=1e-3 data.seq_len=2048",
    )
    parser.add_argument("--print", action="store_true", help="show the configuration")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_hosts_options(parser)
    return parser
