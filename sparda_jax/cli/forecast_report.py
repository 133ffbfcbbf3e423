"""`sparda forecast-report`: how good Forecast heads are, layer by layer."""

import argparse
import hashlib
import pathlib
from typing import Any

from tqdm import tqdm

from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import ConfigError, integer, number, path, require
from sparda_jax.cli.console import advance, note
from sparda_jax.cli.model_options import add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.evaluation import plots
from sparda_jax.evaluation.documents import token_rows
from sparda_jax.evaluation.forecast_pages import write_pages
from sparda_jax.evaluation.forecast_report import (
    Thresholds,
    forecast_report,
    verdict,
)
from sparda_jax.evaluation.layer_budgets import (
    choose_layer_budgets,
    compare_budgets,
    read_layer_budgets,
    write_layer_budgets,
)

_EXAMPLES = """\
examples:
  sparda forecast-report --text manual=pydoc --out report
      SmolLM2's heads on Python's manual
  sparda forecast-report --model qwen.gguf --forecast heads.safetensors \\
      --tokens 30720 --text code=stdlib --text prose=moby.txt --held-out 0.1 \\
      --min-recall 0.9 --min-recall-at-budget 0.93 --out report
      only documents that training with `held_out=0.1` left alone; status 1 if a
      threshold is not met

OUT gets report.json (all figures, by layer, head, position, budget and distance),
report.md and, with matplotlib, plots for light and dark pages; and
layer-budgets.json, a block budget for each layer that reads as many blocks in all as
the flat one: sj.SparseConfig(block_budget=...).
"""


def add_forecast_report_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "forecast-report",
        help="how good Forecast heads are: recall, mass, misses, by layer and text",
        description=(
            "Runs texts through a model and compares, for every token and layer, the "
            "blocks that the Forecast heads choose with those of the layer's own "
            "queries and with the true attention mass."
        ),
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_model_options(parser, attention=False, mesh=False)
    group = parser.add_argument_group("texts")
    add_option(
        group,
        "--text",
        path,
        metavar="NAME=SOURCE",
        repeated=True,
        help="a domain: 'stdlib', 'pydoc', a file or a directory of text; may be given "
        "several times",
    )
    add_option(group, "--tokens", integer(1), metavar="N", default=4096, help="a row")
    add_option(
        group, "--rows", integer(1), metavar="N", default=2, help="a text, at most"
    )
    add_option(
        group,
        "--held-out",
        number(least=0, most=0.5),
        metavar="SHARE",
        default=0.0,
        help="take only documents that training with this data.held_out left alone "
        "(0: all)",
    )
    add_option(
        group,
        "--split-seed",
        integer(0),
        metavar="N",
        default=42,
        help="data.seed of that training",
    )
    limits = parser.add_argument_group(
        "thresholds, in every text (status 1 if not met)"
    )
    share = number(least=0, most=1)
    for name, what in (
        ("--min-recall", "mean recall of the chosen blocks"),
        ("--min-recall-at-budget", "the same with the forced blocks"),
        ("--min-layer-recall", "recall of the worst layer"),
        ("--min-mass", "mean attention mass in the lists"),
        ("--max-lost", "mean mass that the own query's lists have and these do not"),
    ):
        add_option(limits, name, share, metavar="X", help=what)
    add_option(
        parser,
        "--layer-budgets",
        path,
        metavar="FILE",
        help="judge these budgets by layer on the texts: a layer-budgets.json of a run "
        "on others (default: budgets chosen from these texts)",
    )
    add_option(
        parser, "--out", path, metavar="DIR", required=True, help="where files go"
    )
    parser.set_defaults(run=_report)


def _sources(given: list[str]) -> dict[str, str]:
    """Source by name; a text without a name is called by its source."""
    require(bool(given), "--text", given, "given at least once")
    found = {}
    for item in given:
        name, named, source = item.partition("=")
        if not named:
            name, source = pathlib.PurePath(item).name.partition(".")[0], item
        require(bool(name and source), "--text", item, "of the form NAME=SOURCE")
        require(name not in found, "--text", item, "of a name that is not yet taken")
        found[name] = source
    return found


def _heads(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the report says of the heads."""
    if arguments.forecast is None:
        return {"heads": "built in"}
    file = pathlib.Path(arguments.forecast)
    if not file.is_file():
        return {"heads": arguments.forecast}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"heads": file.name, "heads_sha256": digest}


def _report(arguments: argparse.Namespace) -> None:
    names = ("min_recall", "min_recall_at_budget", "min_layer_recall", "min_mass")
    limits = Thresholds(**{n: getattr(arguments, n) for n in (*names, "max_lost")})
    sources = _sources(arguments.text)
    budgets = None
    if arguments.layer_budgets is not None:
        budgets = read_layer_budgets(arguments.layer_budgets)
    folder = pathlib.Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out={arguments.out!r} is not allowed: it must be a directory that can "
            f"be written to ({error.strerror or error})"
        ) from error
    lm = load_model(arguments, "sparda")
    if lm.tokenizer is None:
        raise ConfigError(f"forecast-report reads texts: {lm.no_tokenizer}")
    longest = lm.config.max_context
    require(
        arguments.tokens <= longest, "--tokens", arguments.tokens, f"at most {longest}"
    )
    texts = {
        name: token_rows(
            source,
            lm.tokenizer.encode,
            tokens=arguments.tokens,
            count=arguments.rows,
            held_out=arguments.held_out,
            seed=arguments.split_seed,
        )
        for name, source in sources.items()
    }
    about = {
        **_heads(arguments),
        "texts": sources,
        "held_out": arguments.held_out,
        "split_seed": arguments.split_seed,
    }
    total = sum(map(len, texts.values())) * lm.config.num_layers
    with tqdm(
        total=total, desc="measuring", unit="layer", leave=False, disable=None
    ) as bar:
        report = forecast_report(
            lm,
            texts,
            about=about,
            on_layer=lambda: advance(bar, 1),
            # A run that is cut off still tells something.
            on_domain=lambda known: write_json(folder / "report.json", known),
        )
    report["verdict"] = verdict(report, limits)
    if budgets is None:
        budgets = choose_layer_budgets(report)
        write_layer_budgets(folder / "layer-budgets.json", budgets)
    report["layer_budgets"] = compare_budgets(report, budgets)
    write_json(folder / "report.json", report)
    files = write_pages(report, folder)
    if not plots.available():
        note("note: no plots: they need matplotlib (pip install 'sparda-jax[eval]')")
    for name, figures in report["domains"].items():
        means = figures["means"]
        print(
            f"{name}: recall {means['recall']:.3f}, at budget "
            f"{means['recall_at_budget']:.3f}, mass {means['forecast_mass']:.3f} (own "
            f"query {means['own_mass']:.3f}, oracle {means['oracle_mass']:.3f})"
        )
    by_layer = report["layer_budgets"]
    print(
        f"budgets by layer, {by_layer['blocks_read']:.1f} blocks on average: mass "
        f"{by_layer['mass']:.4f}; {by_layer['flat']} in every layer: "
        f"{by_layer['flat_mass']:.4f}"
    )
    print(f"{folder}: report.json, {', '.join(files)}")
    missed = [check for check in report["verdict"] if not check["passed"]]
    for check in missed:
        note(
            f"not met: {check['domain']}: {check['figure']} is {check['value']:.4f}, "
            f"wanted {check['limit']}"
        )
    if missed:
        raise SystemExit(1)
