"""Sources, packing, the split, repeatable order; bad input gives one clear error."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from sparda_jax.evaluation.documents import DataError, read_documents
from train.config import DataConfig
from train.data import (
    NoWholeRow,
    PackedRows,
    batches,
    data_identity,
    held_out_rows,
    open_sources,
    pack,
    training_data,
)
from train.text import Corpus, load_corpus, open_source, save_corpus, tokenize

DATA = DataConfig(sources=(("a", 3.0), ("b", 1.0)), seq_len=256, held_out=0.2)


class Bytes:
    """A tokenizer: the bytes of the text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def _corpus(name="a", documents=80, low=0, seed=0) -> Corpus:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 700, documents)
    tokens = rng.integers(low, low + 50, lengths.sum()).astype(np.uint32)
    return Corpus(name, (tokens,), (np.cumsum(lengths),), 128)


def test_directories_of_all_kinds(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"packed"))
    # What ends a line of text is no end of a line of JSON.
    rows = ({"text": text} for text in ("one", "t\u2028w\x85o"))
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jsonl").write_text(lines + "\n\n", newline="")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    texts = list(read_documents(str(tmp_path)))
    assert texts == ["code", "plain", "packed", "one", "t\u2028w\x85o"]
    corpus = open_source(str(tmp_path), Bytes(), 256)
    assert [end - begin for _, begin, end in corpus.documents()] == [4, 5, 6, 3, 8]


def test_built_in_corpora():
    topics = list(read_documents("pydoc"))
    assert len(topics) > 50 and any("Emulating" in text for text in topics)
    first = next(iter(read_documents("stdlib")))
    assert isinstance(first, str) and first


def test_records_are_a_source_that_repeats_and_resumes(monkeypatch):
    monkeypatch.setattr("sparda_jax.evaluation.records.DOCUMENTS", 12)
    corpora = [open_source(name, Bytes(), 256) for name in ("records", "records:5")]
    sources = (("records", 1.0), ("records:5", 3.0))
    data = DataConfig(
        sources=sources, seq_len=1024, packing="joined", held_out=0.2, seed=1
    )
    again = open_sources(data, Bytes(), 256)
    assert data_identity(again) == data_identity(corpora)
    assert corpora[0].digest() != corpora[1].digest()
    first, second = (
        batches(training_data(two, data, block=64, batch=2)) for two in (corpora, again)
    )
    for _ in range(3):
        np.testing.assert_array_equal(next(first)["tokens"], next(second)["tokens"])
    state = json.loads(json.dumps(first.get_state()))
    wanted = [next(first)["tokens"] for _ in range(3)]
    third = batches(training_data(again, data, block=64, batch=2))
    third.set_state(state)
    for tokens in wanted:
        np.testing.assert_array_equal(next(third)["tokens"], tokens)
    assert held_out_rows(corpora, data, block=64, count=2)


def test_prepared_corpora_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr("train.text.SHARD_TOKENS", 4000)
    corpus = _corpus()
    save_corpus(corpus, tmp_path / "shards")
    again = load_corpus(tmp_path / "shards", 128)
    assert len(again.tokens) > 1

    def documents(corpus):
        return [corpus.tokens[s][a:b].tolist() for s, a, b in corpus.documents()]

    assert documents(again) == documents(corpus)


def test_joined_rows_run_through_documents():
    corpus = _corpus()
    data = dataclasses.replace(DATA, packing="joined", held_out=0.0)
    rows = PackedRows(corpus, data, 64, held_out=False)
    assert len(rows) == corpus.num_tokens // 256
    seen = [rows[index] for index in range(len(rows))]
    tokens = np.concatenate([row["tokens"] for row in seen])
    np.testing.assert_array_equal(tokens, corpus.tokens[0][: len(tokens)])
    assert all(np.all(row["start"] == 0) for row in seen)
    assert all(np.all(row["end"] == 256) for row in seen)


@pytest.mark.parametrize("packing", ["documents", "long"])
def test_rows_hold_every_token_once(packing):
    corpus = _corpus()
    data = dataclasses.replace(DATA, packing=packing, held_out=0.0)
    rows = PackedRows(corpus, data, 64, held_out=False)
    seen = []
    for index in range(len(rows)):
        row = rows[index]
        place = np.arange(256)
        inside = place < row["end"]
        seen += row["tokens"][inside].tolist()
        assert np.all(row["start"] % 64 == 0)
        assert np.all((row["start"] <= place) & (row["start"] < row["end"]))
        assert np.all(row["tokens"][~inside] == 0)
        if packing == "long":
            assert np.all(row["start"] == 0) and np.all(row["end"] == 256)
    ends = corpus.ends[0]
    lengths = np.diff(ends, prepend=0)
    kept = lengths if packing == "documents" else lengths // 256 * 256
    assert len(seen) == kept.sum()
    if packing == "documents":
        assert sorted(seen) == sorted(corpus.tokens[0].tolist())
        # Little room is left over.
        assert len(seen) > 0.8 * 256 * len(rows)


def test_packing_is_repeatable():
    rows = PackedRows(_corpus(), DATA, 64, held_out=False)
    again = PackedRows(_corpus(), DATA, 64, held_out=False)
    assert rows._rows == again._rows
    assert pack([], 256, 64, 0) == []


def test_split_is_by_document_and_independent_of_the_rest():
    whole = _corpus()

    def sides(corpus):
        out = []
        for side in (False, True):
            rows = PackedRows(corpus, DATA, 64, held_out=side)
            pieces = [piece for row in rows._rows for piece in row]
            out.append({(p.shard, p.begin, p.length) for p in pieces})
        return out

    train, held = sides(whole)
    assert train and held and not train & held
    # Taking documents away from the end moves none of the others.
    short = Corpus("a", whole.tokens, (whole.ends[0][:40],), 128)
    part = sides(short)
    assert part[0] <= train and part[1] <= held


def test_order_is_repeatable_and_resumes_exactly():
    corpora = [_corpus("a"), _corpus("b", low=60, seed=1)]

    def stream():
        return batches(training_data(corpora, DATA, block=64, batch=4))

    first = stream()
    taken = [next(first) for _ in range(12)]
    state = None
    second = stream()
    for step in range(12):
        if step == 5:
            # As a checkpoint keeps it.
            state = json.loads(json.dumps(second.get_state()))
        np.testing.assert_array_equal(next(second)["tokens"], taken[step]["tokens"])
    third = stream()
    third.set_state(state)
    for step in range(5, 12):
        np.testing.assert_array_equal(next(third)["tokens"], taken[step]["tokens"])
    # Weights 3:1, told by the token ranges.
    share = np.mean([batch["tokens"][:, 0] < 60 for batch in taken])
    assert share == 0.75


def test_processes_share_the_global_batch():
    corpora = [_corpus("a"), _corpus("b", low=60, seed=1)]
    whole = next(batches(training_data(corpora, DATA, block=64, batch=4)))["tokens"]
    parts = [
        next(batches(training_data(corpora, DATA, block=64, batch=4, part=(i, 2))))
        for i in range(2)
    ]
    together = np.stack([part["tokens"] for part in parts], 1).reshape(whole.shape)
    np.testing.assert_array_equal(together, whole)


def test_held_out_rows_take_turns():
    corpora = [_corpus("a"), _corpus("b", low=60, seed=1)]
    rows = held_out_rows(corpora, DATA, block=64, count=4)
    assert [int(row["tokens"][0] >= 60) for row in rows] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no text"),
        ({"a.txt": b""}, "holds no text"),
        ({"a.txt": b"caf\xe9"}, "a.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        ({"a.gz": b"not gzip"}, "a.gz cannot be read"),
        ({"a.jsonl": b"{"}, "line 1: is no valid JSON"),
        ({"a.jsonl": b"[" * 100_000}, "line 1: is no valid JSON"),
        ({"a.jsonl": b'{"text": "\\ud800"}'}, "line 1: holds half a character"),
        ({"a.jsonl": b'{"body": 1}'}, 'line 1 has no text: it must be .* "text"'),
    ],
)
def test_bad_text_is_one_clear_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), Bytes(), 256)


def test_other_bad_input_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        list(read_documents("nowhere"))
    with pytest.raises(DataError, match=r"id 200.*128 tokens"):
        tokenize("x", [chr(200)], type("T", (), {"encode": lambda s, t: [200]})(), 128)
    with pytest.raises(DataError, match="has no tokenizer"):
        open_source("pydoc", None, 128)
    save_corpus(_corpus(), tmp_path / "shards")
    with pytest.raises(DataError, match="vocabulary of 128, and the model's is 256"):
        load_corpus(tmp_path / "shards", 256)
    with pytest.raises(DataError, match="the tokenizer made id -1, but"):
        tokenize("x", ["a"], type("T", (), {"encode": lambda s, t: [3, -1]})(), 128)
    (tmp_path / "shards" / "tokens-00000.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="no usable token corpus"):
        load_corpus(tmp_path / "shards", 128)
    short = dataclasses.replace(DATA, seq_len=1 << 20)
    with pytest.raises(NoWholeRow, match="less than one sequence of seq_len=1048576"):
        training_data([_corpus()], short, block=64, batch=1)
    data = dataclasses.replace(DATA, sources=((str(tmp_path / "none"), 1.0),))
    with pytest.raises(DataError, match="does not exist"):
        open_sources(data, Bytes(), 256)


@pytest.mark.parametrize(
    ("tokens", "ends", "message"),
    [
        (np.array([1, 2, 128, 4], "u4"), [2, 4], "holds the token id 128, .* 0 to 127"),
        (np.array([1, -2, 3, 4]), [2, 4], "holds the token id -2"),
        (np.arange(4.0), [2, 4], "tokens-00000.npy does not hold one axis of integers"),
        (np.ones((2, 2), "u2"), [2], "tokens-00000.npy does not hold one axis"),
        (np.array([{}, 1]), [2], "no usable token corpus"),
        (np.arange(4), [3, 2, 4], "ends-00000.npy: its ends .* not in rising order"),
        (np.arange(4), [-1, 2, 4], "ends-00000.npy: its ends .* not in rising order"),
        (np.arange(4), [9, 4], "not in rising order"),
        (np.arange(4), [2, 3], "documents do not fill their 4 tokens"),
        (np.arange(4), [], "does not hold one axis|do not fill"),
        (np.arange(4), [[2, 4]], "does not hold one axis"),
        (np.arange(4), [True], "does not hold one axis"),
    ],
)
def test_damaged_corpora_are_refused_at_the_start(
    tmp_path, monkeypatch, tokens, ends, message
):
    monkeypatch.setattr("train.text._CHUNK", 3)
    path = tmp_path / "shards"
    save_corpus(_corpus(documents=2), path)
    np.save(path / "tokens-00000.npy", tokens, allow_pickle=True)
    np.save(path / "ends-00000.npy", np.asarray(ends))
    with pytest.raises(DataError, match=message) as error:
        load_corpus(path, 128)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "[" * 100_000,
        "1" * 5000,
        '{"format": "sparda-tokens", "vocab_size": 128, "shards": 0}',
        '{"format": "sparda-tokens", "vocab_size": 128, "shards": 1e400}',
        '{"format": "sparda-tokens", "vocab_size": 128, "shards": 7}',
        '{"format": "sparda-tokens", "vocab_size": true, "shards": 1}',
        '{"format": "sparda-tokens", "vocab_size": "128", "shards": 1}',
        '{"format": ' + " " * (1 << 21),
        b"\xff",
    ],
)
def test_damaged_indices_are_refused(tmp_path, index):
    path = tmp_path / "shards"
    save_corpus(_corpus(documents=2), path)
    (path / "index.json").write_bytes(
        index if isinstance(index, bytes) else index.encode()
    )
    with pytest.raises(DataError, match="no usable token corpus") as error:
        load_corpus(path, 128)
    assert len(str(error.value)) < 500


def test_the_digest_is_of_the_text_and_not_of_its_files(tmp_path, monkeypatch):
    corpus = _corpus()
    known = corpus.digest()
    monkeypatch.setattr("train.text.SHARD_TOKENS", 4000)
    save_corpus(corpus, tmp_path / "shards")
    again = load_corpus(tmp_path / "shards", 128)
    assert len(again.tokens) > 1 and again.tokens[0].dtype != corpus.tokens[0].dtype
    assert again.digest() == known
    tokens = corpus.tokens[0].copy()
    tokens[-1] ^= 1
    moved = corpus.ends[0].copy()
    moved[3] -= 1
    for changed in (
        Corpus("a", (tokens,), corpus.ends, 128),
        Corpus("a", corpus.tokens, (moved,), 128),
    ):
        assert changed.num_tokens == corpus.num_tokens and changed.digest() != known


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-at-all/x", "/dev/null"])
def test_names_that_no_file_has_are_one_line(name):
    with pytest.raises(DataError, match="does not exist: it must be") as error:
        open_source(name, Bytes(), 256)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
