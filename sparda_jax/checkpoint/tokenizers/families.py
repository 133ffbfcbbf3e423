"""Byte-level BPE of GGUF files, by the family that `tokenizer.ggml.pre` names."""

from collections.abc import Callable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

Vocab = dict[str, int]
Merges = list[tuple[str, str]]

# Families differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# These cut words where capitals begin; contractions are a family's own.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+END|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*END|\p{{N}}DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated", invert=False)
        for p in patterns
    ]
    return pre_tokenizers.Sequence([*parts, _byte_level(use_regex=False)])


def _bpe(
    vocab: Vocab,
    merges: Merges,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    whole_words: bool = False,
) -> tokenizers.Tokenizer:
    """With `whole_words` a word that is a token is taken without asking the merges."""
    model = models.BPE(vocab, merges, ignore_merges=whole_words)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    return _bpe(vocab, merges, _byte_level(use_regex=True))


def _smollm(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    parts = pre_tokenizers.Sequence([digits, _byte_level(use_regex=True)])
    return _bpe(vocab, merges, parts)


def _qwen2(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    backend = _bpe(vocab, merges, _split(_WORDS.format(digits="")))
    backend.normalizer = normalizers.NFC()
    return backend


def _deepseek_qwen(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    return _bpe(vocab, merges, _split(_WORDS.format(digits="")))


def _llama3(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    words = _split(_WORDS.format(digits="{1,3}"))
    return _bpe(vocab, merges, words, whole_words=True)


def _smaug(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    return _bpe(vocab, merges, _split(_WORDS.format(digits="{1,3}")))


def _tekken(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    words = _split(_CASED.replace("END", "").replace("DIGITS", ""))
    return _bpe(vocab, merges, words, whole_words=True)


def _gpt4o(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    end = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    words = _CASED.replace("END", end).replace("DIGITS", "{1,3}")
    return _bpe(vocab, merges, _split(words))


def _deepseek_coder(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    parts = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    return _bpe(vocab, merges, _split(*parts))


def _deepseek_v3(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    marks = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    words = (
        rf"{marks}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _bpe(vocab, merges, _split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", words))


Family = Callable[[Vocab, Merges], tokenizers.Tokenizer]

FAMILIES: dict[str, Family] = {
    "smollm": _smollm,
    "starcoder": _smollm,
    "refact": _smollm,
    "command-r": _smollm,
    "codeshell": _smollm,
    "exaone": _smollm,
    "minerva-7b": _smollm,
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "jais": _gpt2,
    "qwen2": _qwen2,
    "megrez": _qwen2,
    "deepseek-r1-qwen": _deepseek_qwen,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "falcon-h1": _llama3,
    "pixtral": _llama3,
    "midm-2.0": _llama3,
    "lfm2": _llama3,
    "smaug-bpe": _smaug,
    "dbrx": _smaug,
    "tekken": _tekken,
    "gpt-4o": _gpt4o,
    "llama4": _gpt4o,
    "deepseek-coder": _deepseek_coder,
    "deepseek-v3": _deepseek_v3,
}
# These begin a text with `bos_token_id` unless the file says otherwise.
ADDS_BOS = frozenset(name for name, make in FAMILIES.items() if make is _llama3)
