"""Forecast weights as a file of their own.

Layer l's Forecast selects the blocks of layer l+1 (`sparda_jax.models.forecast`), so
there are projections for layers 0..L-2, and layer 0 has its own one, the current
projection. They fit one base model and one geometry of the selection; the file says
which, and loading compares.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.atomic import new_file, write_safetensors
from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import open_regular
from sparda_jax.checkpoint.hf import read_safetensors
from sparda_jax.checkpoint.hf_config import sparse_config
from sparda_jax.checkpoint.torch_file import TorchTensor, read_torch_file
from sparda_jax.config import ConfigError, ForecastReads, ModelConfig, SparseConfig
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.low_rank import LowRankHeads
from sparda_jax.models.weights import from_query_heads

FORMAT = "sparda-forecast"
# What other libraries write; `checkpoint.export` does so for other engines.
_PLAIN = "pt"
# The second version says how many queries a kv head has, and may hold low-rank changes
# of the model's query weights (`models.low_rank`). Whole matrices of one query a kv
# head are still written as the first, which older programs read. The third says that
# heads read what a layer's MLP reads.
VERSIONS = ("1", "2", "3")

# The fields on which the scores depend: which keys are averaged, and which averages a
# block takes its score from.
GEOMETRY = ("kernel_size", "kernel_stride", "block_size")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FLOATS = tuple(
    np.dtype(kind) for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
)


@dataclasses.dataclass(frozen=True)
class ForecastWeights:
    """Forecast projections of one base model.

    Attributes:
      future: [L-1, K·R·H, D] float32; `future[l]` is layer l's, it selects for l + 1.
      current: [K·R·H, D] float32; layer 0's own.
      base_fingerprint: Hash of the base model, None if it is not known.
      sparse: Selection settings that they were trained for, None if not known.
      info: Whatever else the file says: `base_name`, `version`, `extra`.
      queries: R, queries a kv head (`models.forecast`).
      reads: What they read of a layer (`ModelConfig.forecast_reads`).
      low_rank: How a file of low rank holds them; `future` and `current` are what it
        comes to with the base model's query weights. None for whole matrices.
    """

    future: np.ndarray
    current: np.ndarray
    base_fingerprint: str | None = None
    sparse: SparseConfig | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    queries: int = 1
    low_rank: LowRankHeads | None = None
    reads: ForecastReads = "input"


def save_forecast(
    path: str | os.PathLike,
    weights: ForecastWeights,
    *,
    base_name: str,
    extra: Mapping[str, Any] | None = None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a Forecast file, whole or not at all.

    Args:
      path: The file, `.safetensors`; one that exists is replaced.
      weights: What to write.
      base_name: Name of the base model, for people.
      extra: Anything that JSON can say, such as the training settings.
      dtype: Of the matrices in the file.

    Raises:
      CheckpointError: The arrays do not fit together, `extra` is not JSON, or the
        place cannot be written to.
    """
    future, current = weights.future, weights.current
    if future.ndim != 3 or current.ndim != 2 or future.shape[1:] != current.shape:
        raise CheckpointError(
            f"{path}: future has shape {list(future.shape)} and current "
            f"{list(current.shape)}, allowed: [L-1, K·R·H, D] and [K·R·H, D]"
        )
    names = [layout.future_name(layer) for layer in range(future.shape[0])]
    tensors = dict(zip(names, future, strict=True))
    tensors[layout.CURRENT] = current
    metadata = {"format": FORMAT, "version": VERSIONS[0], "base_name": base_name}
    low = weights.low_rank
    if weights.queries > 1 or low is not None:
        metadata |= {"version": VERSIONS[1], "queries": str(weights.queries)}
    if weights.reads != "input":
        metadata |= {"version": VERSIONS[2], "queries": str(weights.queries)}
        metadata["reads"] = weights.reads
    if low is not None:
        metadata["rank"] = str(low.rank)
        tensors = {}
        for layer, name in enumerate([layout.CURRENT, *names]):
            parts = (low.gain[layer], low.down[layer].T, low.up[layer].T)
            for part, array in zip(layout.PARTS, parts, strict=True):
                tensors[layout.part_name(name, part)] = array
    tensors = {k: np.ascontiguousarray(array, dtype) for k, array in tensors.items()}
    if weights.base_fingerprint is not None:
        metadata["base_fingerprint"] = weights.base_fingerprint
    if weights.sparse is not None:
        metadata["sparse_config"] = json.dumps(weights.sparse.to_json())
    try:
        metadata["extra"] = json.dumps(dict(extra or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: extra is not JSON: {error}") from error
    with new_file(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def _check_geometry(
    path: pathlib.Path, held: SparseConfig, asked: SparseConfig
) -> None:
    for field in GEOMETRY:
        found, want = getattr(held, field), getattr(asked, field)
        if found != want:
            raise CheckpointError(
                f"{path}: the Forecast was trained for {field} = {found}, and {field} "
                f"= {want} is asked for; allowed: the same"
            )


def _check_fingerprint(
    path: pathlib.Path, info: Mapping[str, Any], held: str | None, asked: str | None
) -> None:
    if held is not None and asked is not None and held != asked:
        raise CheckpointError(
            f"{path}: the Forecast was trained for the base model "
            f"{show(info.get('base_name'))} with fingerprint {held[:80]}, and this "
            f"model's is {asked}; allowed: the same"
        )


def _json_field(path: pathlib.Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {key} is no JSON: {error}") from error


def _own_sparse(path: pathlib.Path, values: object) -> SparseConfig | None:
    """SparseConfig from the JSON of its own fields."""
    if values is None:
        return None
    names = {field.name for field in dataclasses.fields(SparseConfig)}
    if not isinstance(values, dict) or not names.issuperset(values):
        unknown = sorted(set(values) - names) if isinstance(values, dict) else values
        raise CheckpointError(
            f"{path}: metadata sparse_config holds {show(unknown)}, allowed: an object "
            f"with {', '.join(sorted(names))}"
        )
    fields: dict[str, Any] = dict(values)
    if isinstance(values.get("block_budget"), list):  # One number a layer.
        fields["block_budget"] = tuple(values["block_budget"])
    for name, value in fields.items():
        by_layer = name == "block_budget" and isinstance(value, tuple)
        if not by_layer and type(value) is not type(getattr(SparseConfig(), name)):
            raise CheckpointError(
                f"{path}: metadata sparse_config.{name} = {show(value)}, allowed: a "
                f"value like {getattr(SparseConfig(), name)!r}"
            )
    try:
        return SparseConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: metadata sparse_config: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a file of either kind says; `arrays` are not read yet."""

    arrays: Mapping[str, Any]
    fingerprint: str | None
    sparse: SparseConfig | None
    info: Mapping[str, Any]
    queries: int = 1
    rank: int | None = None
    reads: ForecastReads = "input"


def _from_safetensors(path: pathlib.Path) -> _Held:
    tensors, metadata = read_safetensors(path)
    kind = metadata.get("format")
    if kind == _PLAIN and tensors and all(map(layout.parse_forecast_name, tensors)):
        # The reference's names and nothing else: like its own files it tells no base.
        return _Held(tensors, None, None, {"base_name": None})
    if kind != FORMAT:
        raise CheckpointError(
            f"{path}: metadata format = {show(kind)}, allowed: {FORMAT!r}, or "
            f"{_PLAIN!r} with Forecast tensors alone"
        )
    version = metadata.get("version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path}: metadata version = {show(version)}, allowed: "
            f"{', '.join(map(repr, VERSIONS))}; a newer version of sparda-jax may "
            "have written it"
        )
    for name in tensors:
        if layout.parse_forecast_name(name) is None:
            raise CheckpointError(
                f"{path}: tensor {show(name)} is no Forecast tensor, allowed: "
                f"{layout.future_name(0)} and so on, {layout.CURRENT}"
            )
    info = {
        "base_name": metadata.get("base_name"),
        "version": version,
        "extra": _json_field(path, metadata, "extra"),
    }
    sparse = _own_sparse(path, _json_field(path, metadata, "sparse_config"))
    queries, rank = 1, None
    if version != VERSIONS[0]:
        queries = _count(path, metadata, "queries")
        rank = _count(path, metadata, "rank") if "rank" in metadata else None
    info["rank"] = rank
    held, reads = metadata.get("base_fingerprint"), "input"
    if version == VERSIONS[2]:
        reads = _reads(path, metadata.get("reads"))
    return _Held(tensors, held, sparse, info, queries, rank, reads)


def _reads(path: pathlib.Path, stated: str | None) -> ForecastReads:
    for known in get_args(ForecastReads):
        if stated == known:
            return known
    raise CheckpointError(
        f"{path}: metadata reads = {show(stated)}, allowed: 'input' or 'attended'"
    )


def _count(path: pathlib.Path, metadata: Mapping[str, str], key: str) -> int:
    stated = metadata.get(key, "")
    if not (stated.isdecimal() and 0 < len(stated) < 7 and int(stated) > 0):
        raise CheckpointError(
            f"{path}: metadata {key} = {show(metadata.get(key))}, allowed: a number "
            "from 1 on"
        )
    return int(stated)


def _from_torch(path: pathlib.Path) -> _Held:
    """The reference's training checkpoint, or a bare state dict."""
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, wanted a dict")
    state = content.get("model_state_dict", content)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: model_state_dict = {show(state)}, wanted a dict of tensors"
        )
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and layout.parse_forecast_name(name) is not None
    }
    for name, value in tensors.items():
        if not isinstance(value, TorchTensor) or value.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {name} = {show(value)}, wanted a tensor of floating numbers"
            )
    sparse = None
    ignored: tuple[str, ...] = ()
    if content.get("sparse_config") is not None:
        sparse, ignored = sparse_config(path, content["sparse_config"])
    base = content.get("base_model_path")
    info = {
        "base_name": base if isinstance(base, str) else None,
        "step": content.get("step") if isinstance(content.get("step"), int) else None,
        "ignored_sparse_keys": ignored,
    }
    return _Held(tensors, None, sparse, info)


def _is_torch_file(path: pathlib.Path) -> bool:
    """By the name, or by the first bytes of a zip file."""
    try:
        with open_regular(path) as file:
            return path.suffix.lower() in _TORCH_SUFFIXES or file.read(4) == b"PK\3\4"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _array(path: pathlib.Path, name: str, tensor: Any) -> np.ndarray:
    stored = tensor.numpy() if isinstance(tensor, TorchTensor) else tensor()
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
    return array


def forecast_sparse(path: str | os.PathLike) -> SparseConfig | None:
    """The selection that a file's heads were trained for; None if it does not tell.

    Raises:
      CheckpointError: The file is damaged.
    """
    return _held(pathlib.Path(path)).sparse


class ForecastForm(NamedTuple):
    """What kind of heads a file holds.

    Attributes:
      queries: For each kv head.
      rank: Of the changes of the base model's query weights; None: whole matrices.
      reads: As `ModelConfig.forecast_reads`.
    """

    queries: int
    rank: int | None
    reads: ForecastReads


def forecast_form(path: str | os.PathLike) -> ForecastForm:
    """What kind of heads a file holds; its tensors are not read.

    Raises:
      CheckpointError: The file is damaged.
    """
    held = _held(pathlib.Path(path))
    return ForecastForm(held.queries, held.rank, held.reads)


def _held(path: pathlib.Path) -> _Held:
    return _from_torch(path) if _is_torch_file(path) else _from_safetensors(path)


def load_forecast(
    path: str | os.PathLike,
    *,
    config: ModelConfig,
    fingerprint: str | None,
    sparse: SparseConfig | None,
    model: Decoder | None = None,
) -> ForecastWeights:
    """Reads Forecast weights for a model, from this project's or the reference's file.

    The Forecast was trained to rank blocks by scores of averaged keys, so the kernel,
    its stride and the block size must be those of its training, unless it guesses the
    query of every head, as which it is then scored. How many blocks are then taken
    (budget, init and local blocks) does not enter the scores: these may differ. The
    reference's file (.pt) holds no hash of its base model: only shapes and
    `sparse_config` can be compared.

    Args:
      path: A `.safetensors` file of `save_forecast`, or a torch file of the reference
        (its tensors may be named with `module.`, `model.` or no prefix).
      config: The base model's.
      fingerprint: The base model's; None leaves the comparison out.
      sparse: Settings that will be used; None leaves the comparison out.
      model: The base model, which a low-rank file needs.

    Returns:
      The weights in float32.

    Raises:
      CheckpointError: The file is damaged, or for another model or other settings; the
        message names both values.
    """
    path = pathlib.Path(path)
    held = _held(path)
    # The base model first: another one explains every difference that follows.
    _check_fingerprint(path, held.info, held.fingerprint, fingerprint)
    if held.queries > config.group_size:
        raise CheckpointError(
            f"{path}: metadata queries = {held.queries}, allowed: at most "
            f"{config.group_size}, as many query heads share a kv head of the model"
        )
    config = dataclasses.replace(config, forecast_queries=held.queries)
    if held.sparse is not None and sparse is not None and not config.guesses_queries:
        _check_geometry(path, held.sparse, sparse)
    shapes = {name: tensor.shape for name, tensor in held.arrays.items()}
    names = layout.check_forecast(path, config, shapes, held.rank)
    if not names:
        raise CheckpointError(
            f"{path}: holds no Forecast tensor, wanted {layout.CURRENT} and "
            "q_future_proj of every layer but the last"
        )
    if held.rank is not None:
        return _expanded(path, held, names, config, model)
    future = np.empty(
        (config.num_layers - 1, *layout.forecast_shapes(config)[layout.CURRENT]),
        np.float32,
    )
    for layer in range(config.num_layers - 1):
        name = layout.future_name(layer)
        future[layer] = _array(path, name, held.arrays[names[name]])
    current = _array(path, layout.CURRENT, held.arrays[names[layout.CURRENT]])
    return ForecastWeights(
        future=future,
        current=current,
        base_fingerprint=held.fingerprint,
        sparse=held.sparse,
        info=held.info,
        queries=held.queries,
        reads=held.reads,
    )


def _expanded(
    path: pathlib.Path,
    held: _Held,
    names: Mapping[str, str],
    config: ModelConfig,
    model: Decoder | None,
) -> ForecastWeights:
    """What a low-rank file comes to with the model's query weights."""
    if model is None:
        raise CheckpointError(
            f"{path}: holds changes of the base model's query weights (rank "
            f"{held.rank}): it can be read with the model alone"
        )
    consumed = [layout.future_name(layer) for layer in range(config.num_layers - 1)]

    def stack(part: str) -> np.ndarray:
        wanted = [layout.part_name(x, part) for x in (layout.CURRENT, *consumed)]
        return np.stack([_array(path, x, held.arrays[names[x]]).T for x in wanted])

    low = LowRankHeads(*(stack(part) for part in layout.PARTS))
    queries = from_query_heads(model, held.queries)
    whole = np.stack([np.asarray(head).T for head in low.whole(queries)])
    return ForecastWeights(
        future=whole[1:],
        current=whole[0],
        base_fingerprint=held.fingerprint,
        sparse=held.sparse,
        info=held.info,
        queries=held.queries,
        low_rank=low,
        reads=held.reads,
    )
