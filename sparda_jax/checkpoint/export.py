"""Forecast heads and whole models for other engines.

The reference (NVlabs/SparDA) and the patches for SGLang and vLLM read
`model.layers.{l}.self_attn.q_future_proj.weight` of every layer and layer 0's
`q_curr_proj` (docs/algorithm.md §1.3), one vector for each kv head. The last layer's
q_future_proj feeds nothing; it is written as zeros, so that no engine misses a key.
"""

import dataclasses
import os
import pathlib
from typing import Literal

import ml_dtypes
import numpy as np

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.atomic import new_file, write_safetensors
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.forecast import ForecastWeights
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.hf_config import sparse_json
from sparda_jax.checkpoint.source import CheckpointSource
from sparda_jax.checkpoint.torch_writer import write_torch_file
from sparda_jax.checks import ConfigError
from sparda_jax.config import ForecastReads, SparseConfig

_TORCH = (".pt", ".pth")


def check_exportable(queries: int, reads: ForecastReads) -> None:
    """Refuses heads that the reference's format does not hold.

    Raises:
      ConfigError: They make several queries for each kv head, or read what no other
        engine gives them.
    """
    if reads != "input":
        raise ConfigError(
            "the heads read what a layer's MLP reads, and the reference's read the "
            "layer's input: make such heads with `sparda adapt --queries 1`"
        )
    if queries > 1:
        raise ConfigError(
            f"the heads make {queries} queries for each kv head, and the "
            "reference's format holds one: make such heads with `sparda adapt "
            "--queries 1`"
        )


def reference_tensors(weights: ForecastWeights) -> dict[str, np.ndarray]:
    """The tensors under the reference's names, in bfloat16 where that loses nothing.

    Raises:
      ConfigError: As `check_exportable`.
    """
    check_exportable(weights.queries, weights.reads)
    last = np.zeros_like(weights.current)
    matrices = [*weights.future, last, weights.current]
    names = [layout.future_name(layer) for layer in range(len(weights.future) + 1)]
    tensors = dict(zip([*names, layout.CURRENT], matrices, strict=True))
    small = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}
    if all(np.array_equal(small[k].astype(np.float32), tensors[k]) for k in tensors):
        return small
    return tensors


def export_forecast_file(
    path: str | os.PathLike, weights: ForecastWeights, *, base: str
) -> None:
    """Writes heads as the reference reads them, whole or not at all.

    Args:
      path: `.safetensors`, or `.pt` for the form of the reference's own checkpoints:
        `model_state_dict`, `step`, `sparse_config` and `base_model_path`.
      weights: One query a kv head.
      base: Name or path of the base model, for the torch file.

    Raises:
      ConfigError: The heads make several queries for each kv head.
      CheckpointError: The name ends otherwise, or the place cannot be written to.
    """
    target = pathlib.Path(path)
    tensors = reference_tensors(weights)
    if target.suffix not in (".safetensors", *_TORCH):
        raise CheckpointError(
            f"{target}: its name must end in .safetensors, {' or '.join(_TORCH)}"
        )
    with new_file(target) as temporary:
        if target.suffix == ".safetensors":
            write_safetensors(pathlib.Path(temporary), tensors, {"format": "pt"})
            return
        sparse = None
        if weights.sparse is not None:
            sparse = sparse_json(weights.sparse)
        content = {
            "step": 0,
            "model_state_dict": tensors,
            "sparse_config": sparse,
            "base_model_path": base,
        }
        write_torch_file(pathlib.Path(temporary), content)


def export_hf(
    directory: str | os.PathLike,
    source: CheckpointSource,
    weights: ForecastWeights | None,
    *,
    sparse: SparseConfig | None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> None:
    """Writes a model, dequantised, and its heads as a safetensors directory.

    All of it is in memory at once.

    Args:
      directory: A new or an empty one.
      source: The base model.
      weights: Heads of one query a kv head; None: without heads.
      sparse: Written as `sparse_config`; None leaves it out.
      dtype: Numbers of the files.

    Raises:
      ConfigError: The heads make several queries for each kv head.
      CheckpointError: No config.json can say what the model is, or the place cannot be
        written to.
    """
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    heads = {} if weights is None else reference_tensors(weights)
    # The last layer's feeds nothing; our own directories do without it.
    heads.pop(layout.future_name(source.config.num_layers - 1), None)
    tensors = {
        name: np.asarray(load()).astype(kind)
        for name, load in source.tensors.items()
        if layout.parse_forecast_name(name) is None
    }
    tensors |= {name: np.asarray(array).astype(kind) for name, array in heads.items()}
    config = dataclasses.replace(
        source.config, forecast_queries=1, forecast_reads="input"
    )
    save_hf(directory, config, tensors, source.tokenizer, sparse=sparse, dtype=dtype)
