"""Documents: where text comes from, and token corpora on disk.

A source is "pydoc" or "stdlib", which every Python has, a file or directory of text, or
a directory that `python -m train.prepare` wrote. Whatever it is, it becomes a `Corpus`:
token ids of all documents one after the other, and where each one ends.
"""

import dataclasses
import gzip
import hashlib
import importlib
import json
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from sparda_jax.checkpoint.atomic import new_directory
from sparda_jax.config import ConfigError

FORMAT = "sparda-tokens"
INDEX = "index.json"
SHARD_TOKENS = 1 << 26
_TEXT = (".txt", ".md", ".rst", ".py")
_SUFFIXES = (*_TEXT, ".gz", ".jsonl")
# Of the standard library, what is not code that people read.
_STDLIB_SKIPPED = frozenset(("test", "tests", "site-packages", "dist-packages"))


class DataError(ConfigError):
    """Text or a token corpus cannot be used."""


@runtime_checkable
class Encoder(Protocol):
    """What the corpus needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of several documents.

    Attributes:
      name: For messages.
      tokens: All token ids, possibly mapped from files; one array a shard.
      ends: Where each document ends in its shard, one array a shard.
      vocab_size: Of the tokenizer that made the ids.
    """

    name: str
    tokens: tuple[np.ndarray, ...]
    ends: tuple[np.ndarray, ...]
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(shard) for shard in self.tokens)

    def documents(self) -> Iterator[tuple[int, int, int]]:
        """(shard, begin, end) of every document."""
        for shard, ends in enumerate(self.ends):
            begin = 0
            for end in ends:
                yield shard, begin, int(end)
                begin = int(end)


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
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _file_documents(path: pathlib.Path) -> Iterator[str]:
    inner = pathlib.Path(path.stem) if path.suffix == ".gz" else path
    text = _decoded(_read(path), str(path))
    if inner.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
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
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        yield from _file_documents(path)
        return
    if not path.is_dir():
        raise DataError(
            f"source {source!r} does not exist: it must be 'stdlib', 'pydoc', a file "
            f"or a directory with {', '.join(_SUFFIXES)} files, or a directory that "
            "train.prepare wrote"
        )
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix in _SUFFIXES:
            yield from _file_documents(file)


def tokenize(
    name: str, texts: Iterable[str], tokenizer: Encoder, vocab_size: int
) -> Corpus:
    """Tokenizes documents; empty ones are left out.

    Raises:
      DataError: If there is no token at all, or an id is not in the vocabulary.
    """
    pieces, lengths = [], []
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int64)
        if ids.size == 0:
            continue
        if ids.max() >= vocab_size:
            raise DataError(
                f"{name}: the tokenizer made id {ids.max()}, but the model has "
                f"{vocab_size} tokens: it is another model's tokenizer"
            )
        pieces.append(ids.astype(np.uint32))
        lengths.append(ids.size)
    if not pieces:
        raise DataError(f"{name} holds no text: every source must have some")
    ends = np.cumsum(np.asarray(lengths, np.int64))
    return Corpus(name, (np.concatenate(pieces),), (ends,), vocab_size)


def save_corpus(corpus: Corpus, path: str | pathlib.Path) -> None:
    """Writes a token corpus as shards, whole or not at all.

    Raises:
      CheckpointError: If the directory exists and is not empty, or cannot be written.
    """
    small = corpus.vocab_size <= 1 << 16
    shards: list[list[np.ndarray]] = [[]]
    filled = 0
    for shard, begin, end in corpus.documents():
        if filled and filled + end - begin > SHARD_TOKENS:
            shards.append([])
            filled = 0
        shards[-1].append(corpus.tokens[shard][begin:end])
        filled += end - begin
    with new_directory(path) as folder:
        for number, documents in enumerate(shards):
            tokens = np.concatenate(documents)
            kind = np.uint16 if small else np.uint32
            np.save(folder / f"tokens-{number:05d}.npy", tokens.astype(kind))
            ends = np.cumsum([len(document) for document in documents])
            np.save(folder / f"ends-{number:05d}.npy", ends.astype(np.int64))
        index = {
            "format": FORMAT,
            "name": corpus.name,
            "vocab_size": corpus.vocab_size,
            "shards": len(shards),
            "tokens": corpus.num_tokens,
            "documents": sum(len(ends) for ends in corpus.ends),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def is_prepared(source: str) -> bool:
    """Whether a source is a directory of `save_corpus`."""
    return (pathlib.Path(source).expanduser() / INDEX).is_file()


def load_corpus(path: str | pathlib.Path, vocab_size: int) -> Corpus:
    """Opens a directory of `save_corpus`; tokens stay in the files.

    Raises:
      DataError: If it is damaged, or was made with another vocabulary.
    """
    path = pathlib.Path(path).expanduser()
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format is {index['format']!r}, not {FORMAT!r}")
        held, numbers = int(index["vocab_size"]), range(int(index["shards"]))
        tokens = tuple(
            np.load(path / f"tokens-{number:05d}.npy", mmap_mode="r")
            for number in numbers
        )
        ends = tuple(np.load(path / f"ends-{number:05d}.npy") for number in numbers)
        for shard, stops in zip(tokens, ends, strict=True):
            if len(stops) == 0 or stops[-1] != len(shard):
                raise ValueError("a shard is shorter than its documents")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no usable token corpus: {error}") from error
    if held != vocab_size:
        raise DataError(
            f"{path} was tokenized with a vocabulary of {held}, and the model's is "
            f"{vocab_size}: prepare it again with this model"
        )
    return Corpus(str(path), tokens, ends, vocab_size)


def open_source(source: str, tokenizer: Encoder | None, vocab_size: int) -> Corpus:
    """A source as tokens: opened if it is prepared, else tokenized now.

    Raises:
      DataError: If it cannot be used; says why.
    """
    if is_prepared(source):
        return load_corpus(source, vocab_size)
    if tokenizer is None:
        raise DataError(
            f"source {source!r} is text, and the model has no tokenizer: it must be a "
            "directory that train.prepare wrote"
        )
    return tokenize(source, read_documents(source), tokenizer, vocab_size)


def is_held_out(tokens: np.ndarray, share: float, seed: int) -> bool:
    """Whether a document is kept for evaluation.

    It depends on the document's beginning alone, so that it stays on its side however
    sources are ordered or mixed, and copies of a document go together.
    """
    beginning = np.asarray(tokens[:256], np.uint32).tobytes()
    digest = hashlib.sha256(seed.to_bytes(8, "little") + beginning).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64
