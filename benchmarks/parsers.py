"""The parser of a measuring command."""

import argparse

from sparda_jax.checks import integer, number
from sparda_jax.cli.options import Parser, add_file_option, add_option


def benchmark_parser(name: str, text: str | None) -> Parser:
    """A parser of `python -m benchmarks.NAME`, whose help is a text as it stands."""
    return Parser(
        f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_document_options(parser: Parser) -> None:
    """Adds what commands ask that replay a model's lists over a document."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="code", help="prose, code or a text file")
    add_file_option(parser)
    tokens = {"metavar": "N", "default": 4096, "help": "tokens in all"}
    add_option(parser, "--context", integer(1), **tokens)
    slots = {"metavar": "C", "default": [1.0, 2.0, 4.0], "help": "in budgets"}
    add_option(parser, "--slots", number(least=1), many=True, **slots)
