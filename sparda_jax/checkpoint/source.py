"""Opening a model, whatever it is stored in."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.tensors import TensorLoader, fingerprint_of_loaders
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.config import ModelConfig, SparseConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pt")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """An opened model; its weights are still in the file.

    Attributes:
      config: Shape and arithmetic of the model.
      tensors: Hugging Face name to loader. A loader returns its array when called,
        [out, in] for linears, float32, float16 or bfloat16, anew each time; it also
        knows the array's `shape`. No `lm_head.weight` when the head is tied. Forecast
        projections are there when the file holds them: layers 0..L-2 and
        `q_curr_proj` of layer 0.
      tokenizer: None if the file has none.
      path: The file or directory.
      sparse: The file's own selection settings, None if it has none.
      ignored_sparse_keys: Entries of the file's sparse_config that `sparse` leaves out.
      tokenizer_error: Why there is no tokenizer although the file has one.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorLoader]
    tokenizer: Tokenizer | None
    path: pathlib.Path
    sparse: SparseConfig | None = None
    ignored_sparse_keys: tuple[str, ...] = ()
    tokenizer_error: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the base model's weights, see `tensors.fingerprint`.

        Computed when it is first asked for, from samples alone (0.1 s for 135M
        parameters).
        """
        return fingerprint_of_loaders(self.tensors)

    def load(
        self, names: Iterable[str] | None = None, *, workers: int | None = None
    ) -> dict[str, np.ndarray]:
        """Loads several arrays with a few threads.

        Args:
          names: Which ones, all by default.
          workers: Threads, by default one a core, at most 4.

        Returns:
          Arrays by name, in the order of `names`.
        """
        wanted = list(self.tensors if names is None else names)
        threads = workers or min(4, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            arrays = pool.map(lambda name: self.tensors[name](), wanted)
            return dict(zip(wanted, arrays, strict=True))


def _quoted(path: str) -> str:
    """A path for a message: whole unless absurd, and printable whatever it holds."""
    return repr(path) if len(path) <= 300 else show(path)


def _is_hub_id(text: str) -> bool:
    """Whether a name that is no file can be one of the hub: `org/name`, and no path.

    A name that was meant as a path must not be sent to the hub: the answer would be
    about the hub, and somebody else may have a model of that name.
    """
    path = pathlib.Path(text)
    means_path = (
        text.startswith((".", "~"))
        or path.suffix.lower() in _FILE_SUFFIXES
        or path.parent.exists()
    )
    return bool(_HUB_ID.fullmatch(text)) and not means_path


def _download(hub_id: str, files: list[str]) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: there is no such file, and a hub id needs the package "
            "huggingface_hub (pip install 'sparda-jax[hub]')"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(hub_id, allow_patterns=files)
    # Every transport has its own errors; all of them mean that there is no model.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{hub_id}: there is no such file, and the hub gave no model: {reason}"
        ) from error
    return pathlib.Path(found)


def _locate(text: str, hub_files: list[str]) -> pathlib.Path | None:
    """The file or directory of that name, fetched if it is one of the hub's."""
    try:
        path = pathlib.Path(text).expanduser()
        exists = path.exists()
        on_hub = not exists and _is_hub_id(text)
    # expanduser raises RuntimeError for a user whose home is not known.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{_quoted(text)}: is no valid path: {reason}") from error
    if on_hub:
        return _download(text, hub_files)
    return path if exists else None


def read_shape(path_or_id: str) -> tuple[ModelConfig, SparseConfig | None] | None:
    """Shape and own selection of a model, without its weights where it has none here.

    Args:
      path_or_id: As for `open_checkpoint`. Of a hub id only the config.json is
        fetched, and a directory needs no more.

    Returns:
      Both, the selection None where the model has none; None if there is no such file.

    Raises:
      CheckpointError: The model is damaged or not supported.
    """
    path = _locate(path_or_id, ["config.json"])
    if path is None:
        return None
    if path.is_dir() and not any(path.glob("*.safetensors")):
        from sparda_jax.checkpoint.hf import read_config

        config, sparse = read_config(path)
        # A directory of the hub's cache is named by a hash.
        hub = path.name != pathlib.Path(path_or_id).name
        return dataclasses.replace(config, name=path_or_id) if hub else config, sparse
    source = open_checkpoint(path)
    return source.config, source.sparse


def open_checkpoint(path_or_id: str | os.PathLike) -> CheckpointSource:
    """Opens a model without reading its weights.

    Args:
      path_or_id: A GGUF file, a directory with config.json and safetensors files, or
        a hub id `org/name`, for which huggingface_hub must be installed. A name with
        the suffix of a file, beginning with `.`, `~` or `/`, or whose first part is a
        directory here, is a path and never asked of the hub.

    Returns:
      The opened model.

    Raises:
      CheckpointError: There is no such model, or it is damaged or not supported.
    """
    # Imported here: a directory does not need the gguf package, which takes 70 ms.
    text = os.fspath(path_or_id)
    path = _locate(text, _HUB_FILES)
    if path is None:
        raise CheckpointError(
            f"{_quoted(text)}: there is no such file; allowed: a GGUF file, a "
            "safetensors directory, a hub id 'org/name'"
        )
    if path.is_dir():
        from sparda_jax.checkpoint.hf import read_directory

        directory = read_directory(path)
        return CheckpointSource(
            directory.config,
            directory.tensors,
            directory.tokenizer,
            path,
            directory.sparse,
            directory.ignored_sparse_keys,
            directory.tokenizer_error,
        )
    if not path.is_file():  # Opening a pipe would wait for a writer.
        raise CheckpointError(f"{path}: is neither a regular file nor a directory")
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: allowed: the directory that holds it, with its config.json"
        )
    from sparda_jax.checkpoint.gguf import read_gguf

    model = read_gguf(path)
    return CheckpointSource(
        model.config,
        model.tensors,
        model.tokenizer,
        path,
        tokenizer_error=model.tokenizer_error,
    )
