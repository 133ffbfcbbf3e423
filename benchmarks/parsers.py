"""The parser of a measuring command."""

import argparse

from sparda_jax.cli.options import Parser


def benchmark_parser(name: str, text: str | None) -> Parser:
    """A parser of `python -m benchmarks.NAME`, whose help is a text as it stands."""
    return Parser(
        f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
