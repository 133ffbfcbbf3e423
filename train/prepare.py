"""`python -m train.prepare`: tokenizes text once, to shards that training opens."""

import argparse
import itertools
import sys

from sparda_jax.checkpoint.fetch import fetch_default_model
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.cli.options import Parser
from sparda_jax.evaluation.documents import DataError, read_documents
from sparda_jax.models.presets import PRESETS, get_preset
from train.command import run_command
from train.text import save_corpus, tokenize


def _open(model: str):
    if model in PRESETS:
        if not get_preset(model).fetchable:
            raise DataError(
                f"model {model!r} has no tokenizer to fetch: give the path of its file "
                "or directory"
            )
        return open_checkpoint(fetch_default_model())
    return open_checkpoint(model)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog="python -m train.prepare", description=__doc__)
    parser.add_argument("sources", nargs="+", help="stdlib, pydoc, records, paths")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer")
    parser.add_argument("--out", required=True, help="new or empty directory")
    return run_command(lambda: _prepare(parser.parse_args(arguments)))


def _prepare(options: argparse.Namespace) -> None:
    source = _open(options.model)
    if source.tokenizer is None:
        raise DataError(f"model {options.model!r} has no tokenizer")
    texts = itertools.chain.from_iterable(map(read_documents, options.sources))
    name = "+".join(options.sources)
    corpus = tokenize(name, texts, source.tokenizer, source.config.vocab_size)
    save_corpus(corpus, options.out)
    documents = sum(map(len, corpus.ends))
    print(f"{options.out}: {corpus.num_tokens} tokens in {documents} documents")


if __name__ == "__main__":
    sys.exit(main())
