"""The options that choose a model and its attention, and the loading of it."""

import argparse
import dataclasses
from typing import Any, get_args

from tqdm import tqdm

import sparda_jax as sj
from sparda_jax.checks import FLOAT_DTYPES, ConfigError, choice, integer, path
from sparda_jax.cli.console import advance, note
from sparda_jax.cli.options import add_option
from sparda_jax.config import KeyCodec, SparseConfig
from sparda_jax.engine.model import LanguageModel
from sparda_jax.loading import ForecastBase
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.decoder import Storage
from sparda_jax.models.presets import PRESETS
from sparda_jax.sparse.selectors import selector_names

PREFILL_CHUNK = 1024


def add_model_options(
    parser: argparse.ArgumentParser, *, attention: bool = True, mesh: bool = True
) -> None:
    """Adds the options that `load_model` reads.

    Args:
      parser: Where to.
      attention, mesh: Whether --attention and --mesh are among them.
    """
    group = parser.add_argument_group("model and attention")
    add_option(
        group,
        "--model",
        path,
        metavar="M",
        default="smollm2-135m",
        help="preset name, GGUF file, safetensors directory or hub id",
    )
    if attention:
        add_attention_option(group, default="dense")
    add_option(
        group,
        "--forecast",
        path,
        metavar="F",
        help="Forecast weights for sparda: a file, or 'from_query' (training-free); "
        "those of smollm2-135m and qwen2.5-coder-0.5b are built in",
    )
    bases = get_args(ForecastBase)
    add_option(
        group,
        "--forecast-base",
        choice(*bases),
        words=bases,
        default="exact",
        help="models that a named file of heads serves: its own weights, or any of its "
        "shape on which a measurement finds that its recall holds",
    )
    add_block_options(group)
    add_option(
        group,
        "--dtype",
        choice(*FLOAT_DTYPES),
        words=FLOAT_DTYPES,
        help="of weights and cache (float32 on a CPU, bfloat16 elsewhere)",
    )
    if mesh:
        add_mesh_option(group)
    add_option(
        group,
        "--weights",
        choice("int8"),
        words=("int8",),
        help="decode with copies of the weights in 8-bit integers: faster on a CPU",
    )
    group.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled code for the next start",
    )


def add_mesh_option(group: Any) -> None:
    """Adds --mesh."""
    add_option(
        group,
        "--mesh",
        MeshConfig.parse,
        metavar="data=A,model=B",
        help="share rows over A groups of B devices, which share every layer: kv heads "
        "with their host memory, the MLP and the vocabulary (one device)",
    )


def add_attention_option(group: Any, default: str) -> None:
    """Adds --attention."""
    names = selector_names()
    add_option(
        group,
        "--attention",
        choice(*names),
        metavar="A",
        default=default,
        help="one of " + ", ".join(names),
    )


_BLOCK_OPTIONS = ("block_budget", "local_blocks", "init_blocks", "compressed_keys")


def add_block_options(group: Any) -> None:
    """Adds the options that `with_blocks` reads."""
    add_option(
        group,
        "--block-budget",
        integer(1),
        metavar="P",
        help="KV blocks read per token",
    )
    add_option(
        group,
        "--local-blocks",
        integer(1),
        metavar="W",
        help="blocks before a token's own",
    )
    add_option(group, "--init-blocks", integer(0), metavar="I", help="leading blocks")
    add_option(
        group,
        "--compressed-keys",
        choice(*get_args(KeyCodec)),
        words=get_args(KeyCodec),
        help="how the key means that blocks are scored by are kept (exact)",
    )


def with_blocks(base: SparseConfig, arguments: argparse.Namespace) -> SparseConfig:
    """The block selection, with what the options change of it."""
    given = {
        name: getattr(arguments, name)
        for name in _BLOCK_OPTIONS
        if getattr(arguments, name) is not None
    }
    return dataclasses.replace(base, **given)


def _keep_compiled_code() -> None:
    """Keeps compiled code between starts; without a place for it, goes on without."""
    try:
        sj.configure_cache()
    except ConfigError as error:
        note(f"note: compiled code is not kept: {error}")


def load_model(
    arguments: argparse.Namespace, attention: str, storage: Storage = "per_layer"
) -> LanguageModel:
    """Loads what the options ask for, with a progress bar over the layers."""
    if not arguments.no_compilation_cache:
        _keep_compiled_code()
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
            forecast_base=arguments.forecast_base,
            dtype=arguments.dtype,
            weights=arguments.weights,
            storage=storage,
            mesh=getattr(arguments, "mesh", None),
            on_layer=lambda: advance(bar, 1),
        )
    return dataclasses.replace(lm, sparse=with_blocks(lm.sparse, arguments))
