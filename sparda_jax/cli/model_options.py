"""The options that choose a model and its attention, and the loading of it."""

import argparse
import dataclasses
import os

import jax
from tqdm import tqdm

import sparda_jax as sj
from sparda_jax.checkpoint.fetch import cache_directory
from sparda_jax.cli.console import advance, note
from sparda_jax.config import SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.models.presets import PRESETS
from sparda_jax.sparse.selectors import get_selector, selector_names

_DTYPES = ("float32", "bfloat16", "float16")
PREFILL_CHUNK = 1024


def add_model_options(
    parser: argparse.ArgumentParser, *, attention: bool = True
) -> None:
    """Adds the options that `load_model` reads, without --attention where unwanted."""
    group = parser.add_argument_group("model and attention")
    group.add_argument(
        "--model",
        metavar="M",
        default="smollm2-135m",
        help="preset name, GGUF file, safetensors directory or hub id",
    )
    if attention:
        group.add_argument(
            "--attention",
            metavar="A",
            default="dense",
            help="one of " + ", ".join(selector_names()),
        )
    group.add_argument(
        "--forecast",
        metavar="F",
        help=(
            "Forecast weights for sparda: a file, or 'from_query' (training-free); "
            "SmolLM2's are built in"
        ),
    )
    group.add_argument(
        "--block-budget", metavar="P", type=int, help="KV blocks read per token"
    )
    group.add_argument(
        "--local-blocks", metavar="W", type=int, help="blocks before a token's own"
    )
    group.add_argument("--init-blocks", metavar="I", type=int, help="leading blocks")
    group.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of weights and cache (float32 on a CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled code for the next start",
    )


def _keep_compiled_code() -> None:
    """Keeps compiled code between starts; without a place for it, goes on without."""
    folder = cache_directory() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        note(f"note: {folder} is not writable, so compiled code is not kept")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _sparse(base: SparseConfig, arguments: argparse.Namespace) -> SparseConfig:
    given = {
        name: getattr(arguments, name)
        for name in ("block_budget", "local_blocks", "init_blocks")
        if getattr(arguments, name) is not None
    }
    return dataclasses.replace(base, **given)


def load_model(arguments: argparse.Namespace, attention: str) -> LanguageModel:
    """Loads what the options ask for, with a progress bar over the layers."""
    if not arguments.no_compilation_cache:
        _keep_compiled_code()
    get_selector(attention)  # an unknown name is refused before anything is fetched
    layers = (
        PRESETS[arguments.model].model.num_layers
        if arguments.model in PRESETS
        else None
    )
    with tqdm(
        total=layers, desc="loading", unit="layer", leave=False, disable=None
    ) as bar:
        lm = sj.load(
            arguments.model,
            attention=attention,
            forecast=arguments.forecast,
            dtype=arguments.dtype,
            on_layer=lambda: advance(bar, 1),
        )
    return dataclasses.replace(lm, sparse=_sparse(lm.sparse, arguments))
