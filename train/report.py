"""`python -m train.report`: held-out figures of Forecast heads, by domain, as JSON.

    python -m train.report --config configs/smollm2_distill_gpu.py \
        --heads ours=out/forecast.safetensors --unseen novel.txt --out report.json

For every source of the configuration (its held-out documents) and every `--unseen` one:
recall and captured attention mass by layer, for the named heads and `from_query`; and
with `--perplexity N`, of N rows, the perplexity of dense attention, of the layer's own
queries (`infllm_v2`) and of SparDA with each of the heads, all with one budget. Only
tokens for which blocks are chosen count. `--out` is written after each source. A source
of the configuration that holds no whole row out is left out, and named.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import sparda_jax as sj
from sparda_jax.checkpoint.forecast import load_forecast
from sparda_jax.checks import integer, require
from sparda_jax.cli.options import Parser, add_file_option
from sparda_jax.cli.packages import command_needs
from sparda_jax.config import ConfigError, ForecastReads
from sparda_jax.evaluation.perplexity import perplexity
from sparda_jax.models.weights import forecast_heads

with command_needs("train", __name__):
    from train.backbone import Batch, Settings
    from train.command import run_command
    from train.config import TrainConfig, load_config, with_overrides
    from train.data import NoWholeRow, PackedRows
    from train.init import initial_heads
    from train.metrics import Evaluate, keep_json, make_evaluate
    from train.sharding import make_mesh
    from train.text import open_source
    from train.tiles import Documents


def domain_rows(
    source: str, config: TrainConfig, lm: sj.LanguageModel, *, unseen: bool, count: int
) -> np.ndarray:
    """Up to `count` rows of a source, spread evenly, [rows, seq_len].

    Args:
      source: Name or path.
      config: Whose packing and split count.
      lm: Whose tokenizer and geometry count.
      unseen: All documents may be taken, not only the held-out ones.
      count: Rows.
    """
    corpus = open_source(source, lm.tokenizer, lm.config.vocab_size)
    share = 0.0 if unseen else config.data.held_out
    data = dataclasses.replace(config.data, held_out=share, packing="joined")
    block = (config.sparse or lm.sparse).block_size
    rows = PackedRows(corpus, data, block, held_out=not unseen)
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return np.stack([rows[int(index)]["tokens"] for index in picked])


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m train.report", description=__doc__)
    parser.add_argument("--config", required=True, help="whose model, data and budget")
    parser.add_argument("--set", action="extend", nargs="+", default=[])
    parser.add_argument("--heads", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--unseen", action="append", default=[], metavar="SOURCE")
    parser.add_argument("--rows", type=int, default=8, help="a domain, at most")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time")
    parser.add_argument("--perplexity", type=int, default=0, metavar="ROWS")
    add_file_option(parser, "--out")
    return parser


class Heads(NamedTuple):
    """Heads by consuming layer, and what they read of a layer."""

    matrices: Float[Array, "L D KRH"]
    reads: ForecastReads = "input"


def _named_heads(lm: sj.LanguageModel, items: list[str]) -> dict[str, Heads]:
    """`from_query`, and those of NAME=FILE items."""
    heads = {"from_query": Heads(initial_heads(lm.model, "from_query", 0))}
    for item in items:
        name, _, path = item.partition("=")
        held = load_forecast(
            path,
            config=lm.config,
            fingerprint=lm.fingerprint,
            sparse=lm.sparse,
            model=lm.model,
        )
        found = forecast_heads(lm.config, held.future, held.current, jnp.float32)
        heads[name] = Heads(jnp.stack(found), held.reads)
    return heads


def _evaluations(
    lm: sj.LanguageModel, config: TrainConfig, heads: Iterable[Heads]
) -> dict[ForecastReads, Evaluate]:
    """A program for each of the two that heads may read."""
    found: dict[ForecastReads, Evaluate] = {}
    for kind in {one.reads for one in heads}:
        settings = Settings(
            dataclasses.replace(lm.config, forecast_reads=kind),
            lm.sparse,
            config.loss,
            config.implementation,
            masked_attention=config.attention == "masked",
        )
        found[kind] = make_evaluate(
            lm.model, settings, make_mesh(1), fsdp=False, mass=True
        )
    return found


def report(config: TrainConfig, options: argparse.Namespace) -> dict:
    """The figures."""
    dtype = None if config.dtype is None else jnp.dtype(config.dtype)
    lm = sj.load(config.model, dtype=dtype, storage="stacked", sparse=config.sparse)
    heads = _named_heads(lm, options.heads)
    evaluate = _evaluations(lm, config, heads.values())
    domains: dict = {}
    figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(lm.model.embedding[...].dtype),
        "sparse": dataclasses.asdict(lm.sparse),
        "domains": domains,
    }
    sources = [(name, False) for name, _ in config.data.sources]
    for source, unseen in [*sources, *((name, True) for name in options.unseen)]:
        try:
            rows = domain_rows(source, config, lm, unseen=unseen, count=options.rows)
        except NoWholeRow as error:
            # A few large documents may hold nothing out, and that is no mistake.
            if unseen:
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
            continue
        size = min(options.batch, len(rows))
        batches = [
            Batch(
                jnp.asarray(rows[i : i + size]),
                Documents.whole_rows(size, rows.shape[1]),
            )
            for i in range(0, len(rows) - size + 1, size)
        ]
        out: dict = {"rows": size * len(batches), "tokens": rows.shape[1], "heads": {}}
        for name, one in heads.items():
            found = evaluate[one.reads](lm.model, one.matrices, batches)
            out["heads"][name] = {"means": found.means(), "layers": found.by_layer()}
            print(source, name, json.dumps(found.means()), file=sys.stderr, flush=True)
        if options.perplexity:
            out["perplexity"] = _perplexities(lm, heads, rows[: options.perplexity])
            print(source, json.dumps(out["perplexity"]), file=sys.stderr, flush=True)
        domains[pathlib.Path(source).stem] = out
        keep_json(options.out, figures)
    if not domains:
        raise ConfigError("no source holds a whole row out: there is nothing to report")
    return figures


def _perplexities(
    lm: sj.LanguageModel, heads: dict[str, Heads], rows: np.ndarray
) -> dict[str, float]:
    first = lm.sparse.largest_budget * lm.sparse.block_size
    found = {}
    for name in ("dense", "infllm_v2"):
        chosen = sj.with_attention(lm, name)
        found[name] = perplexity(chosen, list(rows), first=first)
    for name, (matrices, reads) in heads.items():
        cast = list(matrices.astype(lm.model.embedding[...].dtype))
        model = lm.model.with_forecast(cast, reads)
        headed = dataclasses.replace(
            lm, model=model, config=model.config, forecast_sparse=None
        )
        chosen = sj.with_attention(headed, "sparda")
        found[f"sparda, {name}"] = perplexity(chosen, list(rows), first=first)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    for field in ("rows", "batch"):
        integer(1)(f"--{field}", getattr(options, field))
    integer(0)("--perplexity", options.perplexity)
    for item in options.heads:
        require("=" in item, "--heads", item, "of the form NAME=FILE")
    config = with_overrides(load_config(options.config), options.set)
    figures = report(config, options)
    if options.out is None:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())
