"""Checks a tokenizer.json before native code sees it.

Native code cannot be interrupted, and what runs out of memory there ends the process.
So every part must be one that is known, and what it can do to a text is bounded: a text
may not grow by more than a factor, the regular expressions may not take for ever, and
parts may not be nested or repeated at will.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer, show
from sparda_jax.checkpoint.tokenizers.patterns import PatternError, check_pattern

_MAX_GROWTH = 64  # Of the bytes of a text, beyond what Unicode's own mappings do.
_MAX_PARTS = 32
_MAX_NESTED = 3
_MAX_STRING = 256  # Of a replacement or of what is put before a text.
_MAX_AFFIX = 16  # Of what is put to every piece of a word.
_MAX_TOKEN = 1 << 14  # Characters; the longest in use are some hundred spaces.
_MAX_WORD = 1_000
_MAX_TEMPLATE = 64

# For each section, its list of parts in a sequence and the parts that are known.
_SECTIONS = {
    "normalizer": (
        "normalizers",
        "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend "
        "Replace Strip StripAccents",
    ),
    "pre_tokenizer": (
        "pretokenizers",
        "BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation "
        "Split UnicodeScripts Whitespace WhitespaceSplit",
    ),
    "decoder": (
        "decoders",
        "BPEDecoder ByteFallback ByteLevel Fuse Metaspace Replace Strip WordPiece",
    ),
    "post_processor": (
        "processors",
        "BertProcessing ByteLevel RobertaProcessing TemplateProcessing",
    ),
}
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")


class _Check:
    def __init__(self, where: str) -> None:
        self._where = where

    def fail(self, field: str, value: object, allowed: str) -> UnsupportedTokenizer:
        return UnsupportedTokenizer(
            f"{self._where}: {field} = {show(value)} is not supported, allowed: "
            f"{allowed}"
        )

    def string(
        self, part: Mapping[str, Any], field: str, key: str, most: int = _MAX_STRING
    ) -> str:
        value = part.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > most:
            raise self.fail(f"{field}.{key}", value, f"at most {most} characters")
        return value

    def parts(
        self, value: Any, field: str, key: str, depth: int = 0
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The parts of a sequence of sequences, with their fields' names."""
        if value is None:
            return
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            raise self.fail(field, value, "an object with a type")
        if value["type"] != "Sequence":
            yield field, value
            return
        inner = value.get(key)
        if not isinstance(inner, list) or depth == _MAX_NESTED:
            raise self.fail(field, value, f"{key}, at most {_MAX_NESTED} deep")
        for number, part in enumerate(inner[: _MAX_PARTS + 1]):
            yield from self.parts(part, f"{field}.{key}[{number}]", key, depth + 1)

    def pattern(self, part: Mapping[str, Any], field: str) -> str | None:
        """Text of a part's pattern if it is a string, None for a regular expression."""
        pattern = part.get("pattern")
        if isinstance(pattern, dict) and len(pattern) == 1:
            kind, text = next(iter(pattern.items()))
            if kind == "String" and isinstance(text, str):
                return text
            if kind == "Regex" and isinstance(text, str):
                try:
                    check_pattern(text)
                except PatternError as error:
                    raise UnsupportedTokenizer(
                        f"{self._where}: {field}.pattern = {show(text)} is not "
                        f"supported: {error}"
                    ) from error
                return None
        raise self.fail(f"{field}.pattern", pattern, "a String or a Regex")

    def growth(self, section: str, part: Mapping[str, Any], field: str) -> float:
        """How much longer one part makes the bytes of a text at most.

        What Unicode says of a character (its case, its decomposition) counts as one:
        done again it finds nothing left to do.
        """
        kind = part["type"]
        for key in ("prepend", "prefix", "content"):
            self.string(part, field, key)
        if kind == "ByteLevel" and section != "post_processor":
            return 2.0
        if kind == "Split":
            self.pattern(part, field)
        if kind == "Replace":
            text = self.pattern(part, field)
            content = len(self.string(part, field, "content").encode())
            # A regular expression may match between all characters.
            return content / len(text.encode()) if text else 1.0 + content
        if kind == "BPEDecoder" and not part.get("suffix"):
            return 2.0
        if kind == "Precompiled":
            return self.longest_mapping(part, field) / 3
        if kind == "TemplateProcessing":
            return self.template(part, field)
        return 1.0

    def longest_mapping(self, part: Mapping[str, Any], field: str) -> int:
        """Most bytes that a compiled table of characters has for one of them."""
        try:
            data = base64.b64decode(part.get("precompiled_charsmap") or "")
        except (binascii.Error, TypeError, ValueError) as error:
            raise self.fail(field, "precompiled_charsmap", "Base64") from error
        trie = int.from_bytes(data[:4], "little")
        return max(map(len, data[4 + trie :].split(b"\0")))

    def template(self, part: Mapping[str, Any], field: str) -> float:
        """How often a template repeats the text."""
        for key in ("single", "pair"):
            pieces = part.get(key)
            if not isinstance(pieces, list) or len(pieces) > _MAX_TEMPLATE:
                allowed = f"at most {_MAX_TEMPLATE} pieces"
                raise self.fail(f"{field}.{key}", pieces, allowed)
        tokens = part.get("special_tokens")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            ids = token.get("ids") if isinstance(token, dict) else None
            if not isinstance(ids, list) or len(ids) > _MAX_TEMPLATE:
                allowed = f"at most {_MAX_TEMPLATE} ids a token"
                raise self.fail(f"{field}.special_tokens", token, allowed)
        return float(sum("SpecialToken" not in piece for piece in part["single"]))

    def section(self, content: Mapping[str, Any], name: str) -> float:
        """Checks the parts of a section and returns the product of their growths."""
        key, known = _SECTIONS[name]
        growth = 1.0
        for number, (field, part) in enumerate(
            self.parts(content.get(name), name, key)
        ):
            if part["type"] not in known.split():
                raise self.fail(f"{field}.type", part["type"], known)
            if number >= _MAX_PARTS:
                raise self.fail(name, number, f"at most {_MAX_PARTS} parts")
            growth *= max(self.growth(name, part, field), 1.0)
            self.bounded(growth, field)
        return growth

    def bounded(self, growth: float, field: str) -> None:
        if growth > _MAX_GROWTH:
            raise UnsupportedTokenizer(
                f"{self._where}: {field} lets a text grow {growth:.0f} times, "
                f"allowed: {_MAX_GROWTH}"
            )

    def model(self, model: Any) -> None:
        if not isinstance(model, dict):
            raise CheckpointError(f"{self._where}: is no valid tokenizer: no model")
        kind = model.get("type")
        if kind is not None and kind not in _MODELS:  # Old files do not say which.
            raise self.fail("model.type", kind, ", ".join(_MODELS))
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            self.string(model, "model", key, _MAX_AFFIX)
        if model.get("dropout"):
            raise self.fail("model.dropout", model["dropout"], "none: ids would vary")
        longest = model.get("max_input_chars_per_word", 0)
        if not isinstance(longest, int) or longest > _MAX_WORD:
            raise self.fail(
                "model.max_input_chars_per_word", longest, f"at most {_MAX_WORD}"
            )
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            tokens = list(vocab)
        elif isinstance(vocab, list):
            tokens = [entry[0] for entry in vocab if isinstance(entry, list) and entry]
        else:
            raise CheckpointError(f"{self._where}: is no valid tokenizer: no vocab")
        self.tokens("model.vocab", tokens)

    def tokens(self, field: str, tokens: list[Any]) -> None:
        for token in tokens:
            if not isinstance(token, str) or len(token) > _MAX_TOKEN:
                raise self.fail(field, token, f"tokens of {_MAX_TOKEN} characters")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if two readers could understand it differently."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object has a key twice")
    return values


def check_tokenizer(content: Any, where: str) -> None:
    """Refuses a tokenizer.json that could hang or end the process.

    Args:
      content: Its content, read with `unique_keys`.
      where: The file, for messages.

    Raises:
      UnsupportedTokenizer: A part is not known, or does too much.
      CheckpointError: It is no tokenizer.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: is no valid tokenizer: no JSON object")
    check = _Check(where)
    growth = {name: check.section(content, name) for name in _SECTIONS}
    before = growth["normalizer"] * growth["pre_tokenizer"]
    check.bounded(before, "normalizer and pre_tokenizer")
    check.model(content.get("model"))
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise check.fail("added_tokens", added, "a list")
    check.tokens(
        "added_tokens",
        [token.get("content") if isinstance(token, dict) else None for token in added],
    )
