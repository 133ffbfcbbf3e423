"""`sparda export-forecast` and `sparda export`: heads and models for other engines."""

import argparse
import pathlib
from typing import Any

from sparda_jax.checkpoint.export import (
    check_exportable,
    export_forecast_file,
    export_hf,
)
from sparda_jax.checkpoint.forecast import (
    ForecastWeights,
    forecast_form,
    load_forecast,
)
from sparda_jax.checkpoint.source import CheckpointSource
from sparda_jax.checks import ConfigError, choice, path
from sparda_jax.cli.console import note
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.forecasts import published_forecast
from sparda_jax.loading import load, open_model


def add_export_parsers(commands: Any) -> None:
    """Adds both subcommands."""
    heads = commands.add_parser(
        "export-forecast",
        help="write Forecast heads as the reference, SGLang and vLLM read them",
        description=(
            "Write Forecast heads of one query a kv head under the reference's names, "
            "q_future_proj and q_curr_proj."
        ),
        formatter_class=HelpFormatter,
    )
    _add_model(heads)
    add_option(
        heads,
        "--format",
        choice("reference"),
        words=("reference",),
        default="reference",
        help="whose names",
    )
    add_option(
        heads,
        "--out",
        path,
        metavar="FILE",
        required=True,
        help=".safetensors, or .pt for the reference's own kind of checkpoint",
    )
    heads.set_defaults(run=_export_forecast)
    whole = commands.add_parser(
        "export",
        help="write a model and its Forecast heads as a safetensors directory",
        description=(
            "Write a model, dequantised, with its tokenizer and Forecast heads as a "
            "safetensors directory. All of it is in memory at once."
        ),
        formatter_class=HelpFormatter,
    )
    _add_model(whole)
    add_option(
        whole, "--format", choice("hf"), words=("hf",), default="hf", help="of files"
    )
    kinds = ("bfloat16", "float32")
    add_option(
        whole,
        "--dtype",
        choice(*kinds),
        words=kinds,
        default="bfloat16",
        help="of the files",
    )
    add_option(whole, "--out", path, metavar="DIR", required=True, help="new or empty")
    whole.set_defaults(run=_export)


def _add_model(parser: Any) -> None:
    add_option(
        parser,
        "--model",
        path,
        metavar="M",
        default="smollm2-135m",
        help="preset name, GGUF file, safetensors directory or hub id",
    )
    add_option(
        parser,
        "--forecast",
        path,
        metavar="F",
        help="a file of heads (those that are built in for exactly this model)",
    )


def _weights(
    source: CheckpointSource, arguments: argparse.Namespace, *, needed: bool
) -> ForecastWeights | None:
    """The heads of the file that is named, else the published ones, else None."""
    file: pathlib.Path | str | None = arguments.forecast
    if file is None:
        published = published_forecast(source.fingerprint)
        file = None if published is None else published.path
    if file is None:
        if needed:
            raise ConfigError(
                f"--forecast is missing: no heads are built in for "
                f"{source.config.name!r}, so a file must be named"
            )
        return None
    form, model = forecast_form(file), None
    try:
        check_exportable(form.queries, form.reads)
    except ConfigError as error:
        if needed or arguments.forecast is not None:
            raise
        # Nobody asked for them by name.
        note(f"the heads that are built in are left out: {error}")
        return None
    if form.rank is not None:  # changes of the model's query weights
        model = load(
            arguments.model, attention="dense", dtype="float32", storage="stacked"
        ).model
    return load_forecast(
        file,
        config=source.config,
        fingerprint=source.fingerprint,
        sparse=None,
        model=model,
    )


def _export_forecast(arguments: argparse.Namespace) -> None:
    source = open_model(arguments.model)
    weights = _weights(source, arguments, needed=True)
    assert weights is not None
    export_forecast_file(arguments.out, weights, base=arguments.model)
    print(f"{arguments.out}: {len(weights.future)} q_future_proj, q_curr_proj")


def _export(arguments: argparse.Namespace) -> None:
    source = open_model(arguments.model)
    weights = _weights(source, arguments, needed=False)
    sparse = source.sparse if weights is None else weights.sparse
    export_hf(arguments.out, source, weights, sparse=sparse, dtype=arguments.dtype)
    with_heads = "without Forecast heads" if weights is None else "with Forecast heads"
    print(f"{arguments.out}: {source.config.name}, {with_heads}")
