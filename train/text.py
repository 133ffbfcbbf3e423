"""Documents: where text comes from, and token corpora on disk.

A source is "pydoc" or "stdlib", which every Python has, "records", which is made, a
file or directory of text, or a directory that `python -m train.prepare` wrote. Whatever
it is, it becomes a `Corpus`: token ids of all documents one after the other, and where
each one ends.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sparda_jax.checkpoint.atomic import new_directory
from sparda_jax.checkpoint.errors import show
from sparda_jax.checkpoint.files import read_json
from sparda_jax.evaluation.documents import DataError, local_path, read_documents

FORMAT = "sparda-tokens"
# Bytes; a few fields are in it.
_MAX_INDEX = 1 << 20
INDEX = "index.json"
SHARD_TOKENS = 1 << 26
# Tokens that are looked at together.
_CHUNK = 1 << 20


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

    def chunks(self) -> Iterator[np.ndarray]:
        """All token ids, some at a time: they may be far more than memory."""
        for shard in self.tokens:
            for begin in range(0, len(shard), _CHUNK):
                yield shard[begin : begin + _CHUNK]

    def digest(self) -> str:
        """Hash of all documents, however they are stored or divided into shards."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(np.ascontiguousarray(chunk, "<u4"))
        for ends in self.ends:
            found.update(np.diff(ends, prepend=0).astype("<i8"))
        return found.hexdigest()

    def documents(self) -> Iterator[tuple[int, int, int]]:
        """(shard, begin, end) of every document."""
        for shard, ends in enumerate(self.ends):
            begin = 0
            for end in ends:
                yield shard, begin, int(end)
                begin = int(end)


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
        if ids.max() >= vocab_size or ids.min() < 0:
            wrong = ids.max() if ids.max() >= vocab_size else ids.min()
            raise DataError(
                f"{name}: the tokenizer made id {wrong}, but the model has "
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
    path = local_path(source)
    return path is not None and (path / INDEX).is_file()


def load_corpus(path: str | pathlib.Path, vocab_size: int) -> Corpus:
    """Opens a directory of `save_corpus`; tokens stay in the files.

    Raises:
      DataError: If it is damaged, or was made with another vocabulary, or holds ids
        that are not in it.
    """
    path = pathlib.Path(path).expanduser()
    try:
        index = _read_index(path)
        held, count = index["vocab_size"], index["shards"]
        tokens, ends = [], []
        for number in range(count):
            file = path / f"tokens-{number:05d}.npy"
            tokens.append(_integers(file, np.load(file, mmap_mode="r")))
            file = path / f"ends-{number:05d}.npy"
            ends.append(_integers(file, np.load(file)))
            _check_ends(file, ends[-1], len(tokens[-1]))
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no usable token corpus: {reason}") from error
    if held != vocab_size:
        raise DataError(
            f"{path} was tokenized with a vocabulary of {held}, and the model's is "
            f"{vocab_size}: prepare it again with this model"
        )
    corpus = Corpus(str(path), tuple(tokens), tuple(ends), vocab_size)
    _check_ids(corpus)
    return corpus


def _read_index(path: pathlib.Path) -> dict[str, Any]:
    """The index of a directory of `save_corpus`; ValueError if it is none."""
    index = read_json(path / INDEX, _MAX_INDEX)
    if index is None or index.get("format") != FORMAT:
        raise ValueError(f"{INDEX} does not say that its format is {FORMAT!r}")
    for field in ("vocab_size", "shards"):
        value = index.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{INDEX}: {field} is {show(value)}, not 1 or more")
    return index


def _integers(file: pathlib.Path, array: Any) -> np.ndarray:
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 1
        or array.dtype.kind not in "iu"
    ):
        raise ValueError(f"{file.name} does not hold one axis of integers")
    return array


def _check_ends(file: pathlib.Path, ends: np.ndarray, tokens: int) -> None:
    """Documents lie one after the other and fill their shard."""
    if len(ends) == 0 or ends[-1] != tokens:
        raise ValueError(
            f"{file.name}: its documents do not fill their {tokens} tokens"
        )
    if ends[0] < 0 or np.any(ends[1:] < ends[:-1]):
        raise ValueError(f"{file.name}: its ends of documents are not in rising order")


def _check_ids(corpus: Corpus) -> None:
    for chunk in corpus.chunks():
        for wrong in (int(chunk.min()), int(chunk.max())):
            if not 0 <= wrong < corpus.vocab_size:
                raise DataError(
                    f"{corpus.name} holds the token id {wrong}, and allowed are 0 to "
                    f"{corpus.vocab_size - 1}: it is damaged, or was made by another "
                    "tokenizer"
                )


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
