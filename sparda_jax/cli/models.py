"""`sparda models`: what is known by name."""

import argparse
from typing import Any

from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import num_forecast_parameters, num_parameters
from sparda_jax.sparse.selectors import get_selector, selector_names


def add_models_parser(commands: Any) -> None:
    """Adds the subcommand."""
    models = commands.add_parser(
        "models",
        help="list the models and attentions that are known by name",
        description="List the models and attentions that are known by name.",
    )
    models.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> None:
    del arguments
    print(f"{'model':16} {'parameters':>14} {'Forecast':>12} {'context':>8}  about")
    for name, preset in PRESETS.items():
        model = preset.model
        print(
            f"{name:16} {num_parameters(model):14,} "
            f"{num_forecast_parameters(model):12,} {model.max_context:8,}  "
            f"{preset.summary}"
        )
    print("\nA GGUF file, a safetensors directory or a hub id is taken as well.\n")
    print("attention")
    for name in selector_names():
        print(f"{name:16} {get_selector(name).summary}")
