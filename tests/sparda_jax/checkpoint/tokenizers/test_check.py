import base64
import functools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer
from sparda_jax.checkpoint.tokenizers.check import check_tokenizer
from sparda_jax.checkpoint.tokenizers.directory import tokenizer_from_directory
from sparda_jax.checkpoint.tokenizers.families import FAMILIES
from sparda_jax.checkpoint.tokenizers.patterns import PatternError, check_pattern

VOCAB = {"a": 0, "b": 1, "<s>": 2}
PLAIN = json.loads(tokenizers.Tokenizer(models.BPE(VOCAB, [])).to_str())


def _replace(content, **pattern):
    return {
        "type": "Replace",
        "pattern": pattern or {"String": "a"},
        "content": content,
    }


def _sequence(key, *parts):
    return {"type": "Sequence", key: list(parts)}


def _charsmap(*mappings):
    return base64.b64encode(bytes(4) + b"\0".join(mappings) + b"\0").decode()


_NESTED = {"type": "NFC"}
for _ in range(40):
    _NESTED = _sequence("normalizers", _NESTED)

HOSTILE = {
    "forty doubling": {"normalizer": _sequence("normalizers", *[_replace("aa")] * 40)},
    "three long": {"decoder": _sequence("decoders", *[_replace("a" * 100_000)] * 3)},
    "three medium": {"decoder": _sequence("decoders", *[_replace("a" * 200)] * 3)},
    "between": {
        "normalizer": _sequence("normalizers", *[_replace("b", String="")] * 9)
    },
    "any": {"normalizer": _sequence("normalizers", *[_replace("bb", Regex=".?")] * 9)},
    "bytes": {
        "pre_tokenizer": _sequence(
            "pretokenizers",
            *[{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
            * 30,
        )
    },
    "both": {
        "normalizer": _sequence("normalizers", *[_replace("aa")] * 5),
        "pre_tokenizer": _sequence("pretokenizers", *[{"type": "ByteLevel"}] * 5),
    },
    "suffix": {
        "decoder": _sequence("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 30)
    },
    "nested": {"normalizer": _NESTED},
    "many": {"normalizer": _sequence("normalizers", *[{"type": "NFC"}] * 1000)},
    "charsmap": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": _charsmap(b"a" * 1000),
        }
    },
    "templates": {
        "post_processor": _sequence(
            "processors",
            *[
                {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
                    "pair": [],
                    "special_tokens": {},
                }
            ]
            * 20,
        )
    },
    "ids": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "s", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"s": {"id": "s", "ids": [0] * 10_000, "tokens": ["s"]}},
        },
    },
    "backtracking": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+b"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "unknown": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "untyped": {"decoder": {"decoders": []}},
    "model": {"model": {"type": "Elsewhere", "vocab": {}}},
    "prefix": {"model": {**PLAIN["model"], "continuing_subword_prefix": "#" * 99}},
    "dropout": {"model": {**PLAIN["model"], "dropout": 0.5}},
    "token": {"model": {**PLAIN["model"], "vocab": {"a" * 100_000: 0}}},
    "word": {
        "model": {
            "type": "WordPiece",
            "vocab": VOCAB,
            "unk_token": "a",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 10**9,
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_native_code(tmp_path, monkeypatch, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(PLAIN | HOSTILE[name]))

    class Native:
        def __getattr__(self, name):
            raise AssertionError("native code was reached")

    monkeypatch.setattr(tokenizers, "Tokenizer", Native())
    with pytest.raises(UnsupportedTokenizer, match=r"tokenizer\.json: ") as error:
        tokenizer_from_directory(tmp_path, {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": null, '
        '"normalizer": null}',
        '{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}',
    ],
)
def test_two_readers_would_differ(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="key twice"):
        tokenizer_from_directory(tmp_path, {})


def _usual():
    """Tokenizers with the parts that known families have."""
    bpe = tokenizers.Tokenizer(models.BPE(VOCAB, [], byte_fallback=True))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 2)]
    )
    yield bpe
    unigram = tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("▁b", -1.0)], unk_id=0))
    unigram.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            normalizers.Lowercase(),
            normalizers.StripAccents(),
        ]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    yield unigram
    word = tokenizers.Tokenizer(models.WordPiece(VOCAB, unk_token="a"))
    word.normalizer = normalizers.BertNormalizer()
    word.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word.decoder = decoders.WordPiece()
    word.post_processor = processors.BertProcessing(("a", 0), ("b", 1))
    yield word
    for make in FAMILIES.values():
        yield make({"a": 0, "b": 1, "ab": 2}, [("a", "b")])


@functools.cache
def _usual_texts() -> list[str]:
    return [backend.to_str() for backend in _usual()]


def test_usual_files_go_through():
    for backend in _usual():
        check_tokenizer(json.loads(backend.to_str()), "f")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_file_gets_a_raw_error(data):
    """One value anywhere in a usual file is another."""
    content = json.loads(data.draw(st.sampled_from(_usual_texts())))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(
        st.sampled_from([None, 0, -1, 2**80, "x", "", [], {}, [[]], {"type": 1}, True])
    )
    try:
        check_tokenizer(content, "f")
    except CheckpointError as error:
        assert str(error).startswith("f: ")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a*)*",
        "(?:a|a)*b",
        "(?:a?)+",
        "(a|ab)(c|bcd)(d*)*",
        "((a+))+",
        "a*a*a*a*b",
        "a?" * 30 + "a" * 30,
        "(?:a{0,9})*",
        "(?:ab?)*",
        "a{0,1000}a{0,1000}a{0,1000}a{0,1000}b",
        "(a)\\1",
        "\\g<0>",
        "(?<n>a)",
        "(?~ab)",
        "(*FAIL)",
        "(a",
        "a)",
        "[a",
        "a" * 20_000,
        "(" * 50 + ")" * 50,
        "a**",
        "a{2}{9}",
        "\\",
    ],
)
def test_patterns_that_may_take_for_ever(pattern):
    with pytest.raises(PatternError):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        r"(?=(\d{3})+(?!\d))",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r"[\p{Han}]+|[\p{Lu}\p{Lt}&&[^\p{Han}]]*[\p{Ll}]+(?i:'s|'t)?",
        r"<\|startoftext\|>|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"[0-9][0-9][0-9]",
        r"[^]]+|[]a]{1,3}?",
        r"(?i)a+|\x41|A",
    ],
)
def test_patterns_of_known_families(pattern):
    check_pattern(pattern)
