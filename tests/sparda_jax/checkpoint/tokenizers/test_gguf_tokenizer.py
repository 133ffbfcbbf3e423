import itertools
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer
from sparda_jax.checkpoint.gguf_header import GGUFHeader
from sparda_jax.checkpoint.tokenizers.gguf import gguf_tokens, tokenizer_from_gguf

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
HEAD = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))


def _header(**metadata):
    named = {f"tokenizer.{key}": value for key, value in metadata.items()}
    return GGUFHeader(pathlib.Path("model.gguf"), named, {})


def _pieces(seed):
    """A vocabulary of a few letters, all of whose pieces can be reached."""
    rng = random.Random(seed)
    letters = ["▁", "a", "b", "c", "é"]
    pieces = dict.fromkeys(letters)
    while len(pieces) < 40:
        left, right = rng.choice(list(pieces)), rng.choice(list(pieces))
        if len(left + right) <= 6:
            pieces[left + right] = None
    joined = [piece for piece in pieces if len(piece) > 1]
    rng.shuffle(joined)
    return [*letters, *joined]


def _sentencepiece(seed, **changes):
    tokens = [name for name, _ in HEAD] + [f"<0x{n:02X}>" for n in range(256)]
    types = [kind for _, kind in HEAD] + [BYTE] * 256
    pieces = _pieces(seed)
    scores = [0.0] * len(tokens) + [float(-n) for n in range(len(pieces))]
    tokens += [*pieces, "<user>", "ab<ctl>", "aabb"]
    types += [NORMAL] * len(pieces) + [USER, CONTROL, UNUSED]
    scores += [0.0, 0.0, 0.0]
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": np.float32(scores),
        "ggml.token_type": np.int32(types),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    return _header(**{**metadata, **changes})


def _golden(header, text, *, prefix=True):
    """SentencePiece as it is described: join the best neighbours, then bytes."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    types = header.metadata["tokenizer.ggml.token_type"]
    scores = header.metadata["tokenizer.ggml.scores"]
    ids = {t: n for n, t in enumerate(tokens) if types[n] in (NORMAL, USER)}
    out = []
    for part in text.split("<user>"):
        symbols = list(("▁" if prefix else "") + part.replace(" ", "▁")) if part else []
        while True:
            best = max(
                (
                    (scores[ids[a + b]], -n)
                    for n, (a, b) in enumerate(itertools.pairwise(symbols))
                    if a + b in ids
                ),
                default=None,
            )
            if best is None:
                break
            n = -best[1]
            symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
        for symbol in symbols:
            if symbol in ids:
                out.append(ids[symbol])
            else:
                out += [tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
        out.append(ids["<user>"])
    return out[:-1]


@given(st.integers(0, 30), st.text("abcé xß😀", max_size=25), st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_is_that_of_scores(seed, text, prefix):
    header = _sentencepiece(seed, **{"ggml.add_space_prefix": prefix})
    tokenizer = tokenizer_from_gguf(header)
    ids = tokenizer.encode(text)
    assert ids == _golden(header, text, prefix=prefix)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_sentencepiece_special_tokens():
    header = _sentencepiece(3)
    tokenizer = tokenizer_from_gguf(header)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_ids) == (1, True, (2,))
    assert tokenizer.encode("ab<user>c") == _golden(header, "ab<user>c")
    names = {tokenizer.token_id(n) for n in ("<unk>", "<s>", "</s>", "ab<ctl>")}
    for text in ("</s>", "ab<ctl>", "<unk>"):
        assert not set(tokenizer.encode(text)) & names
        assert tokenizer.encode(text, special=True) == [tokenizer.token_id(text)]
    assert tokenizer.token_id("aabb") not in tokenizer.encode("aabb")
    assert not tokenizer_from_gguf(
        _sentencepiece(3, **{"ggml.add_bos_token": False})
    ).add_bos


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ggml.scores": [1.0]}, CheckpointError, "scores = 1, allowed: one a token"),
        ({"ggml.scores": "x"}, CheckpointError, "scores = 'x'"),
        ({"ggml.scores": ["x"]}, CheckpointError, "scores = .*'x'.*a list of numbers"),
        ({"ggml.token_type": ["x"]}, CheckpointError, "token_type = .*a list of num"),
        ({"ggml.scores": None}, CheckpointError, "scores = None"),
        ({"ggml.model": "t5"}, UnsupportedTokenizer, "model = 't5'"),
        ({"ggml.model": "bert"}, UnsupportedTokenizer, "'gpt2' .byte-level BPE. or"),
        (
            {"ggml.model": "gpt2", "ggml.pre": "default"},
            UnsupportedTokenizer,
            "pre = 'default', allowed: one of smollm",
        ),
        ({"ggml.unknown_token_id": 10**6}, CheckpointError, "unknown_token_id"),
        ({"ggml.tokens": ["a" * 100_000]}, CheckpointError, "tokens = 'aaa.*16384"),
    ],
)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message) as found:
        tokenizer_from_gguf(_sentencepiece(0, **changes))
    assert type(found.value) is error
    assert "\n" not in str(found.value)


def test_scores_that_are_none():
    header = _sentencepiece(0)
    scores = np.array(header.metadata["tokenizer.ggml.scores"])
    scores[-1] = np.nan
    with pytest.raises(CheckpointError, match="scores = nan"):
        tokenizer_from_gguf(_sentencepiece(0, **{"ggml.scores": scores}))


def _bytes(names, **changes):
    tokens = [f"t{n}" for n in range(5)] + [name for name, _ in names]
    types = [NORMAL] * 5 + [kind for _, kind in names]
    metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": "qwen2",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [],
    }
    return _header(**{**metadata, **changes})


@pytest.mark.parametrize(
    ("names", "changes", "ends"),
    [
        # Qwen2.5-Coder: the file names the end of a turn alone.
        (
            [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", 3)],
            {"ggml.eos_token_id": 7},
            ["<|im_end|>", "<|endoftext|>"],
        ),
        # Llama 3: the file names the end of the text alone.
        (
            [("<|end_of_text|>", CONTROL), ("<|eot_id|>", 3), ("<|eom_id|>", 3)],
            {"ggml.eos_token_id": 5},
            ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"],
        ),
        ([("<end_of_turn>", CONTROL), ("<eos>", CONTROL)], {}, None),
        ([("</s>", CONTROL)], {}, ["</s>"]),
        # As in a text with tags: a plain token is no end.
        ([("</s>", NORMAL), ("<EOT>", NORMAL)], {}, []),
        # What no text holds is one, whatever its type.
        ([("<|eot_id|>", NORMAL)], {}, ["<|eot_id|>"]),
        ([("x", CONTROL), ("y", 3)], {"ggml.fim_pad_token_id": 5}, ["x"]),
        (
            [("<|return|>", CONTROL), ("<|call|>", 3), ("<|end|>", 3)],
            {"ggml.eos_token_id": 5},
            ["<|return|>", "<|call|>"],
        ),
        (
            [("a", CONTROL)],
            {"ggml.eot_token_id": 5, "ggml.eom_token_id": 0},
            ["a", "t0"],
        ),
    ],
)
def test_end_tokens(names, changes, ends):
    header = _bytes(names, **changes)
    tokenizer = tokenizer_from_gguf(header)
    found = [tokenizer.token(n) for n in tokenizer.eos_ids]
    assert found == (ends if ends is not None else [name for name, _ in names])
    assert gguf_tokens(header).eos_ids == tokenizer.eos_ids
    for name in found:
        if not name.startswith("t"):
            assert tokenizer.encode(f"{name}", special=True) == [
                tokenizer.token_id(name)
            ]
            assert tokenizer.decode([tokenizer.token_id(name)]) == ""


def test_an_unsupported_kind_still_names_its_ends():
    header = _bytes([("<|eot_id|>", CONTROL)], **{"ggml.pre": "unheard-of"})
    with pytest.raises(UnsupportedTokenizer, match="pre = 'unheard-of'"):
        tokenizer_from_gguf(header)
    assert gguf_tokens(header).eos_ids == (5,)
    assert gguf_tokens(_header()) is None


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("tekken", "HelloWorld 123's", ["Hello", "World", "Ġ", "1", "2", "3", "'s"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", "Ġ", "123", "4"]),
        ("gpt-2", "it's  12 a_b", ["it", "'s", "Ġ", "Ġ12", "Ġa", "_", "b"]),
        ("smaug-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("deepseek-r1-qwen", "a 12", ["a", "Ġ", "1", "2"]),
        ("deepseek-coder", "a b12,\n中文x", ["a", "Ġb", "1", "2", ",", "Ċ"]),
        ("deepseek-v3", "a.b .c 1234", ["a", ".b", "Ġ.", "c", "Ġ", "123", "4"]),
    ],
)
def test_families_split_words(pre, text, pieces):
    tokenizer = tokenizer_from_gguf(_bytes([], **{"ggml.pre": pre}))
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split][: len(pieces)] == pieces
