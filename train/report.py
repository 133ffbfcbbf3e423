"""`python -m train.report`: held-out figures of Forecast heads, by domain, as JSON.

    python -m train.report --config configs/smollm2_distill_gpu.py \
        --heads ours=out/forecast.safetensors --unseen novel.txt --out report.json

For every source of the configuration (its held-out documents) and every `--unseen` one:
recall and captured attention mass by layer, for the named heads and `from_query`; and
with `--perplexity N`, of N rows, the perplexity of dense attention, of the layer's own
queries (`infllm_v2`) and of SparDA with each of the heads, all with one budget. Only
tokens for which blocks are chosen count. `--out` is written after each source.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import sparda_jax as sj
from sparda_jax.checkpoint.forecast import load_forecast
from sparda_jax.checks import integer, require
from sparda_jax.cli.options import Parser
from sparda_jax.evaluation.perplexity import perplexity
from sparda_jax.models.weights import forecast_heads
from train.backbone import Batch, Settings
from train.command import run_command
from train.config import TrainConfig, load_config, with_overrides
from train.data import PackedRows
from train.init import initial_heads
from train.metrics import keep_json, make_evaluate
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
    parser.add_argument("--out", type=pathlib.Path)
    return parser


def report(config: TrainConfig, options: argparse.Namespace) -> dict:
    """The figures."""
    dtype = None if config.dtype is None else jnp.dtype(config.dtype)
    lm = sj.load(config.model, dtype=dtype, storage="stacked", sparse=config.sparse)
    settings = Settings(
        lm.config,
        lm.sparse,
        config.loss,
        config.implementation,
        masked_attention=config.attention == "masked",
    )
    heads = {"from_query": initial_heads(lm.model, "from_query", 0)}
    for item in options.heads:
        name, _, path = item.partition("=")
        held = load_forecast(
            path,
            config=lm.config,
            fingerprint=lm.fingerprint,
            sparse=lm.sparse,
            model=lm.model,
        )
        found = forecast_heads(lm.config, held.future, held.current, jnp.float32)
        heads[name] = jnp.stack(found)
    evaluate = make_evaluate(lm.model, settings, make_mesh(1), fsdp=False, mass=True)
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
        rows = domain_rows(source, config, lm, unseen=unseen, count=options.rows)
        size = min(options.batch, len(rows))
        batches = [
            Batch(
                jnp.asarray(rows[i : i + size]),
                Documents.whole_rows(size, rows.shape[1]),
            )
            for i in range(0, len(rows) - size + 1, size)
        ]
        out: dict = {"rows": size * len(batches), "tokens": rows.shape[1], "heads": {}}
        for name, matrices in heads.items():
            found = evaluate(lm.model, matrices, batches)
            out["heads"][name] = {"means": found.means(), "layers": found.by_layer()}
            print(source, name, json.dumps(found.means()), file=sys.stderr, flush=True)
        if options.perplexity:
            out["perplexity"] = _perplexities(lm, heads, rows[: options.perplexity])
            print(source, json.dumps(out["perplexity"]), file=sys.stderr, flush=True)
        domains[pathlib.Path(source).stem] = out
        keep_json(options.out, figures)
    return figures


def _perplexities(
    lm: sj.LanguageModel, heads: dict[str, jax.Array], rows: np.ndarray
) -> dict[str, float]:
    first = lm.sparse.largest_budget * lm.sparse.block_size
    found = {}
    for name in ("dense", "infllm_v2"):
        chosen = sj.with_attention(lm, name)
        found[name] = perplexity(chosen, list(rows), first=first)
    for name, matrices in heads.items():
        cast = list(matrices.astype(lm.model.embedding[...].dtype))
        model = lm.model.with_forecast(cast)
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
