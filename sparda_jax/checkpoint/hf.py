"""Safetensors directories in the layout of Hugging Face, read and written.

Reading maps the files into memory; nothing is copied until an array is used.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.atomic import new_directory, write_safetensors
from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer, show
from sparda_jax.checkpoint.files import is_file, open_regular, read_json
from sparda_jax.checkpoint.hf_config import config_json, model_config, sparse_config
from sparda_jax.checkpoint.hf_experts import join_experts, split_experts
from sparda_jax.checkpoint.tensors import StoredTensor, TensorLoader
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checkpoint.tokenizers.directory import (
    eos_ids_of,
    tokenizer_from_directory,
)
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.spec import EMBEDDING, HEAD

SHARD_BYTES = 5_000_000_000

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ROWS = 4096  # Rows of the vocabulary that are compared at a time.
# Tables that old files hold beside the weights; they follow from the configuration.
_DERIVED = re.compile(
    r"(?:model\.layers\.\d+\.self_attn|model)\.rotary_emb\.[a-z_]+",
)


def read_safetensors(
    path: pathlib.Path,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Opens one safetensors file.

    Args:
      path: The file.

    Returns:
      Its tensors by name, and its metadata.

    Raises:
      CheckpointError: It is missing, damaged or holds another type of numbers.
    """
    try:
        # The library would wait for a pipe. It checks the header: lengths, offsets,
        # sizes, holes and overlaps.
        with open_regular(path) as raw:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = dict(file.metadata() or {})
            length = int.from_bytes(raw.read(8), "little")
            header: dict[str, Any] = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        if os.path.getsize(path) == 8 + length:
            data = np.empty(0, np.uint8)
        else:
            data = np.asarray(np.memmap(path, np.uint8, "r", 8 + length))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no valid safetensors file: {error}") from (
            error
        )
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {show(name)} has type {entry['dtype']}, allowed: "
                f"{', '.join(_DTYPES)}"
            )
        start, end = entry["data_offsets"]
        view = data[start:end].view(dtype).reshape(entry["shape"])
        tensors[name] = StoredTensor(view)
    return tensors, metadata


def _shards(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str] | None]]:
    """Yields each safetensors file with the tensors it must hold, None if unknown."""
    index_path = directory / _INDEX
    # Where both are there the single file counts, as in the library that writes them.
    path = directory / _SINGLE
    single = is_file(path)
    index = None if single else read_json(index_path)
    if index is None:
        if not single:
            raise CheckpointError(
                f"{directory}: holds neither {_SINGLE} nor {_INDEX}, one is needed"
            )
        yield path, None
        return
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{index_path}: weight_map = {show(places)}, allowed: an object of tensor "
            "names and file names"
        )
    files: dict[str, list[str]] = {}
    for name, filename in places.items():
        # A name with a folder in it could point anywhere on the disk.
        if not isinstance(filename, str) or pathlib.Path(filename).name != filename:
            raise CheckpointError(
                f"{index_path}: weight_map[{show(name)}] = {show(filename)}, allowed: "
                "the name of a file beside it"
            )
        files.setdefault(filename, []).append(name)
    for filename, names in files.items():
        path = directory / filename
        if not is_file(path):
            raise CheckpointError(
                f"{path}: is missing; {_INDEX} wants {len(names)} tensors of it, "
                f"such as {show(names[0])}"
            )
        yield path, names


def _read_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path, names in _shards(directory):
        found, _ = read_safetensors(path)
        for name in found if names is None else names:
            if name not in found:
                raise CheckpointError(
                    f"{path}: tensor {show(name)} is missing; {_INDEX} says it is here"
                )
            tensors[name] = found[name]
    return tensors


def _is_tied(found: Mapping[str, StoredTensor]) -> bool:
    """Whether a model said to be tied is: a head that is stored must be the embedding.

    Files exist that say it and hold another head; it is the weights that count.
    """
    if HEAD not in found or EMBEDDING not in found:
        return True
    head, embedding = found[HEAD].view, found[EMBEDDING].view
    if head.shape != embedding.shape or head.ndim != 2:
        return False
    # In pieces: heads that differ do so at once, and equal ones are read only.
    return all(
        np.array_equal(
            head[start : start + _ROWS].astype(np.float32),
            embedding[start : start + _ROWS].astype(np.float32),
        )
        for start in range(0, head.shape[0], _ROWS)
    )


def _select(
    directory: pathlib.Path,
    config: ModelConfig,
    found: Mapping[str, TensorLoader],
) -> dict[str, TensorLoader]:
    """The tensors of the model and its Forecast, checked; no others may be there."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    names = layout.check_base(directory, config, shapes)
    forecast = layout.check_forecast(directory, config, shapes)
    known = set(names)
    for name in shapes:
        tied_head = name == HEAD and config.tie_embeddings
        if name in known or tied_head or layout.parse_forecast_name(name):
            continue
        if not _DERIVED.fullmatch(name):
            raise CheckpointError(
                f"{directory}: tensor {show(name)} of shape {list(shapes[name])} is "
                "not part of a supported model with this config.json"
            )
    tensors = {name: found[name] for name in names}
    return tensors | {name: found[stored] for name, stored in forecast.items()}


@dataclasses.dataclass(frozen=True)
class Directory:
    """What a safetensors directory holds; see `CheckpointSource`."""

    config: ModelConfig
    tensors: Mapping[str, TensorLoader]
    tokenizer: Tokenizer | None
    tokenizer_error: str | None
    sparse: SparseConfig | None
    ignored_sparse_keys: tuple[str, ...]


def read_config(
    directory: str | os.PathLike,
) -> tuple[ModelConfig, SparseConfig | None]:
    """Shape and own selection of a model of whose directory only config.json is here.

    What the weights tell otherwise is as transformers has it: no tied head unless the
    file says so. Special tokens are left out.

    Raises:
      CheckpointError: The file is missing, damaged or asks for what is not supported.
    """
    path = pathlib.Path(directory) / "config.json"
    values = read_json(path)
    if values is None:
        raise CheckpointError(f"{path}: is missing")
    config = model_config(
        path, values, tensors=(), has_head=True, bos_id=None, eos_ids=()
    )
    sparse = None
    if values.get("sparse_config") is not None:
        sparse, _ = sparse_config(path, values["sparse_config"])
    return config, sparse


def read_directory(directory: str | os.PathLike) -> Directory:
    """Opens a safetensors directory; the tensors are read when they are used.

    Args:
      directory: Holds config.json, and model.safetensors or its index and shards.

    Returns:
      What it holds.

    Raises:
      CheckpointError: A file is missing, damaged or asks for what is not supported.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    values = read_json(path)
    if values is None:
        raise CheckpointError(f"{path}: is missing")
    found = _read_tensors(directory)
    tokenizer, reason = None, None
    try:
        tokenizer = tokenizer_from_directory(directory, values)
    except UnsupportedTokenizer as error:
        reason = str(error)
    if tokenizer is not None:
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        eos_ids = tokenizer.eos_ids
    else:
        bos_id = values.get("bos_token_id") if values.get("add_bos_token") else None
        eos_ids = tuple(dict.fromkeys(eos_ids_of(directory, values)))
        if bos_id is not None and not isinstance(bos_id, int):
            raise CheckpointError(
                f"{path}: bos_token_id = {show(bos_id)}, allowed: a token id"
            )
    config = model_config(
        path,
        values,
        tensors=found,
        has_head=HEAD in found,
        bos_id=bos_id,
        eos_ids=eos_ids,
    )
    if config.tie_embeddings and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    if config.tie_embeddings and not _is_tied(found):
        config = dataclasses.replace(config, tie_embeddings=False)
    if tokenizer is not None and tokenizer.plain_vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.plain_vocab_size} tokens, "
            f"allowed: at most vocab_size = {config.vocab_size}"
        )
    sparse, ignored = None, ()
    if values.get("sparse_config") is not None:
        sparse, ignored = sparse_config(path, values["sparse_config"])
    tensors = _select(directory, config, join_experts(directory, config, found))
    return Directory(config, tensors, tokenizer, reason, sparse, ignored)


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes or of one tensor."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _write_shards(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    dtype: np.dtype,
    limit: int,
) -> None:
    sizes = {name: array.size * dtype.itemsize for name, array in tensors.items()}
    groups = _split(sizes, limit)
    places = {}
    for number, names in enumerate(groups, 1):
        filename = _SINGLE
        if len(groups) > 1:
            filename = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # One shard at a time is converted, so that a large model is not copied whole.
        arrays = {
            name: np.ascontiguousarray(tensors[name], dtype=dtype) for name in names
        }
        write_safetensors(folder / filename, arrays, {"format": "pt"})
        places.update(dict.fromkeys(names, filename))
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(folder / _INDEX, index)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        settings["bos_token"] = tokenizer.token(tokenizer.bos_id)
    if tokenizer.eos_ids:
        settings["eos_token"] = tokenizer.token(tokenizer.eos_ids[0])
    if tokenizer.chat_source is not None:
        settings["chat_template"] = tokenizer.chat_source
    if tokenizer.chat_source is not None and tokenizer.tool_source is not None:
        settings["chat_template"] = [
            {"name": "default", "template": tokenizer.chat_source},
            {"name": "tool_use", "template": tokenizer.tool_source},
        ]
    _write_json(folder / "tokenizer_config.json", settings)


def save_hf(
    directory: str | os.PathLike,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
    *,
    sparse: SparseConfig | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a safetensors directory, whole or not at all.

    Args:
      directory: A new or an empty one.
      config: The model's.
      tensors: Arrays by Hugging Face name, [out, in] for linears; Forecast projections
        may be among them.
      tokenizer: Written as tokenizer.json and tokenizer_config.json.
      sparse: Written as `sparse_config` of config.json.
      dtype: Numbers of the file.
      shard_bytes: Largest size of one file; a single tensor may be larger.

    Raises:
      CheckpointError: A tensor is missing, unknown or wrong in shape, no config.json
        can say what the model is, or the place cannot be written to.
    """
    target = pathlib.Path(directory)
    values = config_json(config, target / "config.json", dtype, sparse)
    shapes = {name: array.shape for name, array in tensors.items()}
    names = layout.check_base(target, config, shapes)
    forecast = layout.check_forecast(target, config, shapes)
    unknown = [
        name
        for name in shapes
        if name not in names and layout.parse_forecast_name(name) is None
    ]
    if unknown:
        raise CheckpointError(f"{target}: tensor {unknown[0]} is not part of the model")
    arrays = {name: tensors[name] for name in names}
    arrays |= {name: tensors[stored] for name, stored in forecast.items()}
    arrays = split_experts(config, arrays)
    numbers = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    with new_directory(target) as folder:
        _write_shards(folder, arrays, numbers, shard_bytes)
        _write_json(folder / "config.json", values)
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)
