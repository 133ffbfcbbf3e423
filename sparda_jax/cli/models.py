"""`sparda models`: what is known by name."""

import argparse
from collections.abc import Sequence
from typing import Any

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import path
from sparda_jax.cli.options import add_option
from sparda_jax.loading import open_model
from sparda_jax.models.families.family import variant_of
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import (
    num_active_parameters,
    num_forecast_parameters,
    num_parameters,
)
from sparda_jax.sparse.selectors import get_selector, selector_names


def add_models_parser(commands: Any) -> None:
    """Adds the subcommand."""
    models = commands.add_parser(
        "models",
        help="list the models and attentions that are known by name",
        description="List the models and attentions that are known by name; with "
        "--model, show what one model's files say.",
    )
    add_option(
        models,
        "--model",
        path,
        metavar="FILE",
        help="a GGUF file, a safetensors directory, a hub id or a preset",
    )
    models.set_defaults(run=_models)


def _tokens(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    """Tokens with their names, or what is known of them."""
    if not ids:
        return "none"
    names = [None if tokenizer is None else tokenizer.token(n) for n in ids]
    return ", ".join(
        f"{n}" if name is None else f"{n} {name!r}"
        for n, name in zip(ids, names, strict=True)
    )


def _describe(name: str) -> None:
    source = open_model(name)
    config, tokenizer = source.config, source.tokenizer
    variant = sorted(variant_of(config))
    begins = () if config.bos_id is None else (config.bos_id,)
    lines = {
        "name": config.name,
        "parameters": f"{num_parameters(config):,}",
        "context": f"{config.max_context:,} tokens",
        "layers": f"{config.num_layers} of {config.hidden_size} x {config.ffn_size}",
        "experts": "none"
        if config.dense_mlp
        else f"{config.experts_per_token} of {config.num_experts} a token, "
        f"{num_active_parameters(config):,} parameters in use",
        "heads": f"{config.num_heads} query, {config.num_kv_heads} key-value, of "
        f"{config.head_dim}",
        "features": ", ".join(variant) or "none",
        "RoPE": f"{config.rope.kind}, base {config.rope.theta:g}",
        "head": "tied to the embedding" if config.tie_embeddings else "its own",
        "begins with": _tokens(tokenizer, begins),
        "ends with": _tokens(tokenizer, config.eos_ids),
        "tokenizer": "none" if tokenizer is None else f"{tokenizer.vocab_size} tokens",
        "chat template": "yes"
        if tokenizer is not None and tokenizer.has_chat_template
        else "no",
    }
    for key, value in lines.items():
        print(f"{key:16} {value}")


def _models(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        _describe(arguments.model)
        return
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
