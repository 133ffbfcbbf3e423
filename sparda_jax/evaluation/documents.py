"""Documents: where text comes from, and which of it training leaves alone.

A source is "pydoc" or "stdlib", which every Python has, "records", which is made
(`evaluation.records`), or a file or directory of text.
"""

import gzip
import hashlib
import importlib
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import open_regular, parse_json
from sparda_jax.checks import ConfigError, shown
from sparda_jax.evaluation.records import record_documents, records_seed

_TEXT = (".txt", ".md", ".rst", ".py")
_SUFFIXES = (*_TEXT, ".gz", ".jsonl")
# Of the standard library, what is not code that people read; the manual's topics are a
# source of their own, whose held-out documents must not come in by another door.
_STDLIB_SKIPPED = frozenset(
    ("test", "tests", "site-packages", "dist-packages", "pydoc_data")
)


class DataError(ConfigError):
    """Text or a token corpus cannot be used."""


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte {data[error.start]:#04x} at offset "
            f"{error.start}; convert the file, or leave it out"
        ) from error


def _read(path: pathlib.Path) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _file_documents(path: pathlib.Path) -> Iterator[str]:
    inner = pathlib.Path(path.stem) if path.suffix == ".gz" else path
    text = _decoded(_read(path), str(path))
    if inner.suffix != ".jsonl":
        yield text
        return
    # `splitlines` would cut at U+2028 and the like, which JSON holds as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, f"{path}, line {number}")
        except CheckpointError as error:
            raise DataError(str(error)) from error
        content = record.get("text") if isinstance(record, dict) else None
        if not isinstance(content, str):
            raise DataError(
                f"{path}, line {number} has no text: it must be an object with a "
                '"text" field'
            )
        yield content


def _stdlib_documents() -> Iterator[str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _STDLIB_SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            yield path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            # A few files are in other encodings on purpose.
            continue


def _pydoc_documents() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]


def local_path(source: str) -> pathlib.Path | None:
    """A source as a path; None if there is nothing of that name."""
    try:
        path = pathlib.Path(source).expanduser()
        path.lstat()
    # No such file, or a name that is too long, holds a null character, or begins with
    # the home of nobody.
    except (OSError, ValueError, RuntimeError):
        return None
    return path


def read_documents(source: str) -> Iterator[str]:
    """The texts of a source, in an order that does not change.

    Raises:
      DataError: If there is no such source, or a file of it is not text.
    """
    if source == "stdlib":
        yield from _stdlib_documents()
        return
    if source == "pydoc":
        yield from _pydoc_documents()
        return
    seed = records_seed(source)
    if seed is not None:
        yield from record_documents(seed)
        return
    path = local_path(source)
    if path is not None and path.is_file():
        yield from _file_documents(path)
        return
    if path is None or not path.is_dir():
        raise DataError(
            f"source {shown(source)} does not exist: it must be 'stdlib', 'pydoc', "
            f"'records', a file or a directory with {', '.join(_SUFFIXES)} files, or "
            "(for training) a directory that train.prepare wrote"
        )
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix in _SUFFIXES:
            yield from _file_documents(file)


def is_held_out(tokens: np.ndarray, share: float, seed: int) -> bool:
    """Whether a document is kept for evaluation.

    It depends on the document's beginning alone, so that it stays on its side however
    sources are ordered or mixed, and copies of a document go together.
    """
    beginning = np.asarray(tokens[:256], np.uint32).tobytes()
    digest = hashlib.sha256(seed.to_bytes(8, "little") + beginning).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def token_rows(
    source: str,
    encode: Callable[[str], list[int]],
    *,
    tokens: int,
    count: int,
    held_out: float = 0.0,
    seed: int = 42,
) -> np.ndarray:
    """Rows of a source for measuring: documents joined, rows spread over all of them.

    Args:
      source: As for `read_documents`.
      encode: Of a tokenizer.
      tokens: Of a row.
      count: Rows, at most.
      held_out: Take only the documents that training with this share and seed leaves
        alone; 0 takes all.
      seed: Of the split.

    Returns:
      Ids [rows, tokens], int32.

    Raises:
      DataError: If the source cannot be read, or is shorter than one row.
    """
    pieces = []
    for document in read_documents(source):
        ids = np.asarray(encode(document), np.int32)
        if len(ids) and (not held_out or is_held_out(ids, held_out, seed)):
            pieces.append(ids)
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    rows = len(joined) // tokens
    if rows == 0:
        which = "held-out documents" if held_out else "documents"
        raise DataError(
            f"{source}: its {which} give {len(joined)} tokens, less than one row of "
            f"{tokens}: use more text or shorter rows"
        )
    picked = np.linspace(0, rows - 1, min(count, rows)).round().astype(int)
    return joined[: rows * tokens].reshape(rows, tokens)[picked]
