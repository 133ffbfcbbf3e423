"""Sequences for training: packing, shuffling, mixing, all of it repeatable.

Documents are cut into pieces, and pieces are packed into rows of `seq_len` tokens, each
piece beginning at a block boundary. Rows know where their pieces begin and end, so no
token attends or selects across documents. `grain` shuffles, repeats, mixes and batches,
and its iterator's state is a small JSON object: a resumed run sees the same batches.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

from sparda_jax.evaluation.documents import DataError, is_held_out
from train.config import DataConfig
from train.text import Corpus, Encoder, open_source

# Rows that are open at a time while packing: more leave less room unused.
_OPEN_ROWS = 64


class Row(TypedDict):
    """One sequence: token ids, and each token's document as in `loss.Documents`."""

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of one document: where it lies in the corpus."""

    shard: int
    begin: int
    length: int


def _pieces(corpus: Corpus, data: DataConfig, *, held_out: bool) -> list[Piece]:
    """Pieces of at most `seq_len` tokens of the documents on one side of the split."""
    size = data.seq_len
    if data.packing == "joined":
        size = data.seq_len + corpus.num_tokens
    pieces = []
    for shard, begin, end in corpus.documents():
        tokens = corpus.tokens[shard]
        if is_held_out(tokens[begin:end], data.held_out, data.seed) != held_out:
            continue
        whole, rest = divmod(end - begin, size)
        pieces += [Piece(shard, begin + i * size, size) for i in range(whole)]
        if rest and data.packing != "long":
            pieces.append(Piece(shard, begin + whole * size, rest))
    return pieces


def pack(
    pieces: list[Piece], size: int, block: int, seed: int
) -> list[tuple[Piece, ...]]:
    """Puts pieces into rows: in shuffled order, each into the fullest row it fits.

    Args:
      pieces: Of at most `size` tokens.
      size: Tokens of a row, a multiple of `block`.
      block: Pieces begin at multiples of it.
      seed: Of the order.
    """
    order = np.random.default_rng(seed).permutation(len(pieces))
    rows: list[tuple[Piece, ...]] = []
    opened: list[tuple[int, list[Piece]]] = []  # (blocks left, pieces)
    for index in order:
        piece = pieces[index]
        need = -(-piece.length // block)
        fits = [i for i, (left, _) in enumerate(opened) if left >= need]
        if fits:
            best = min(fits, key=lambda i: opened[i][0])
            left, held = opened.pop(best)
        else:
            left, held = size // block, []
        held.append(piece)
        if left > need:
            opened.append((left - need, held))
        else:
            rows.append(tuple(held))
        if len(opened) > _OPEN_ROWS:
            fullest = min(range(len(opened)), key=lambda i: opened[i][0])
            rows.append(tuple(opened.pop(fullest)[1]))
    return rows + [tuple(held) for _, held in opened]


def join(pieces: list[Piece], size: int) -> list[tuple[Piece, ...]]:
    """Cuts the pieces, one after the other, into rows of `size`; the rest is left."""
    rows: list[tuple[Piece, ...]] = []
    row: list[Piece] = []
    room = size
    for piece in pieces:
        begin, left = piece.begin, piece.length
        while left:
            taken = min(left, room)
            row.append(Piece(piece.shard, begin, taken))
            begin, left, room = begin + taken, left - taken, room - taken
            if room == 0:
                rows.append(tuple(row))
                row, room = [], size
    return rows


class NoWholeRow(DataError):
    """A side of a source's split has not one whole sequence."""


class PackedRows:
    """Random access to the packed rows of a corpus: a grain data source."""

    def __init__(self, corpus: Corpus, data: DataConfig, block: int, *, held_out: bool):
        """Packs one side of the split.

        Args:
          corpus: Tokens.
          data: How to pack, and the split.
          block: Block size.
          held_out: Which side.

        Raises:
          NoWholeRow: If that side has not one whole sequence.
        """
        self._corpus, self._size, self._block = corpus, data.seq_len, block
        self._joined = data.packing == "joined"
        pieces = _pieces(corpus, data, held_out=held_out)
        held = sum(piece.length for piece in pieces)
        side = "held-out" if held_out else "training"
        if held < data.seq_len:
            longest = max((end - begin for _, begin, end in corpus.documents()))
            raise NoWholeRow(
                f"{corpus.name}: its {side} documents give {held} tokens with packing="
                f"{data.packing!r}, less than one sequence of seq_len={data.seq_len} "
                f"(longest document: {longest} tokens): use more text, a shorter "
                f"seq_len or another held_out={data.held_out}"
            )
        if self._joined:
            self._rows = join(pieces, data.seq_len)
        else:
            self._rows = pack(pieces, data.seq_len, block, data.seed)

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Names the corpus: part of grain's checkpoint of a data source."""
        return f"PackedRows({self._corpus.name!r}, {len(self)} rows of {self._size})"

    def __getitem__(self, index: int) -> Row:
        """One row."""
        tokens = np.zeros(self._size, np.int32)
        start = np.zeros(self._size, np.int32)
        end = np.zeros(self._size, np.int32)
        place = 0
        for piece in self._rows[int(index)]:
            shard = self._corpus.tokens[piece.shard]
            stop = place + piece.length
            tokens[place:stop] = shard[piece.begin : piece.begin + piece.length]
            after = place + -(-piece.length // self._block) * self._block
            start[place:after], end[place:after] = place, stop
            place = stop if self._joined else after
        if self._joined:
            start[:], end[:] = 0, self._size
        # What is left over is padding after the last document.
        if place < self._size:
            start[place:], end[place:] = start[place - 1], end[place - 1]
        return Row(tokens=tokens, start=start, end=end)


def open_sources(
    data: DataConfig, tokenizer: Encoder | None, vocab_size: int
) -> list[Corpus]:
    """All sources of a configuration as tokens."""
    return [open_source(name, tokenizer, vocab_size) for name, _ in data.sources]


def training_data(
    corpora: list[Corpus],
    data: DataConfig,
    *,
    block: int,
    batch: int,
    part: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """Endless shuffled batches of the training rows of all sources.

    Args:
      corpora: In the order of `data.sources`.
      data: Weights, packing, seed.
      block: Block size.
      batch: Rows of a batch, over all processes.
      part: (index, count) of this process: it gets every count-th row.
    """
    index, count = part
    sets = []
    for number, corpus in enumerate(corpora):
        rows = PackedRows(corpus, data, block, held_out=False)
        source = grain.MapDataset.source(rows)
        sets.append(source.seed(data.seed + number).shuffle().repeat())
    weights = [weight for _, weight in data.sources]
    total = sum(weights)
    mixed = grain.MapDataset.mix(sets, weights=[w / total for w in weights])
    return mixed[index::count].batch(batch // count, drop_remainder=True)


def batches(dataset: grain.MapDataset) -> grain.DatasetIterator:
    """An iterator whose `get_state` and `set_state` make a run resumable."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(options))


def held_out_rows(
    corpora: list[Corpus], data: DataConfig, *, block: int, count: int
) -> list[Row]:
    """Up to `count` held-out rows, the sources taking turns.

    Sources without a whole held-out sequence are left out.

    Raises:
      NoWholeRow: If no source has one.
    """
    sources, last = [], None
    for corpus in corpora:
        try:
            sources.append(PackedRows(corpus, data, block, held_out=True))
        except NoWholeRow as error:
            last = error
    if not sources:
        assert last is not None
        raise last

    def turns() -> Iterator[Row]:
        for index in range(max(len(source) for source in sources)):
            for source in sources:
                if index < len(source):
                    yield source[index]

    return [row for row, _ in zip(turns(), range(count), strict=False)]


def data_identity(corpora: list[Corpus]) -> list[dict[str, Any]]:
    """What tells two data sets apart, as JSON: a resumed run must see the same."""
    return [
        {
            "tokens": corpus.num_tokens,
            "documents": sum(map(len, corpus.ends)),
            "sha256": corpus.digest(),
        }
        for corpus in corpora
    ]
