"""The tokenizer of a GGUF file."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tokenizers

from sparda_jax.checkpoint.end_tokens import end_tokens
from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer, show
from sparda_jax.checkpoint.gguf_header import GGUFHeader
from sparda_jax.checkpoint.tokenizer import Tokenizer, failed_inside
from sparda_jax.checkpoint.tokenizers.families import ADDS_BOS, FAMILIES
from sparda_jax.checkpoint.tokenizers.sentencepiece import sentencepiece_bpe

_MAX_TOKEN = 1 << 14  # Characters; the longest in use are some hundred spaces.

# Token types of GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

# Ids that a file may give to tokens after which nothing more comes.
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

_NAMES = {"unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token"}


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """Checked access to the tokenizer's part of the metadata."""

    header: GGUFHeader

    def fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(self._message(key, value, allowed))

    def unsupported(self, key: str, value: object, allowed: str) -> CheckpointError:
        return UnsupportedTokenizer(self._message(key, value, allowed))

    def _message(self, key: str, value: object, allowed: str) -> str:
        return (
            f"{self.header.path}: GGUF tokenizer.{key} = {show(value)}, allowed: "
            f"{allowed}"
        )

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.header.metadata.get(f"tokenizer.{key}", default)
        exact = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if value is not None and not exact:
            raise self.fail(key, value, f"a value of type {kind.__name__}")
        return value

    def numbers(self, key: str, count: int, default: float) -> Sequence[float]:
        values = self.header.metadata.get(f"tokenizer.{key}", [default] * count)
        listed = not isinstance(values, str) and hasattr(values, "__len__")
        # The elements of an array of GGUF are all of one type.
        if not listed or any(isinstance(value, str) for value in values[:1]):
            raise self.fail(key, values, "a list of numbers")
        if len(values) != count:
            raise self.fail(key, len(values), f"one a token ({count})")
        return [float(value) for value in values]


@dataclasses.dataclass(frozen=True)
class GGUFTokens:
    """What a GGUF file says of its tokens, whatever kind of tokenizer it has.

    Attributes:
      tokens: All tokens by id.
      types: GGUF's types of them.
      eos_ids: Tokens that end an answer: those that the file names first, then those
        that are known by name.
      bos_id: The token that begins a text, None if there is none.
      add_bos: Whether a plain prompt begins with it; None leaves that to the kind.
    """

    tokens: Sequence[str]
    types: Sequence[float]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    add_bos: bool | None


def _token_id(metadata: _Metadata, name: str, count: int) -> int | None:
    key = f"ggml.{name}_token_id"
    value = metadata.get(key, int)
    if value is not None and not 0 <= value < count:
        raise metadata.fail(key, value, f"0 to {count - 1}")
    return value


def gguf_tokens(header: GGUFHeader) -> GGUFTokens | None:
    """Reads the tokens of a GGUF file, whatever kind of tokenizer it has.

    Args:
      header: The file's header.

    Returns:
      The tokens, None if the file has no tokenizer.

    Raises:
      CheckpointError: The metadata are damaged.
    """
    metadata = _Metadata(header)
    if metadata.get("ggml.model", str) in (None, "none", "no_vocab"):
        return None
    tokens: list[str] = metadata.get("ggml.tokens", list, [])
    if not tokens or len(set(tokens)) != len(tokens):
        raise metadata.fail("ggml.tokens", len(tokens), "a list of distinct tokens")
    longest = max(tokens, key=len)
    if len(longest) > _MAX_TOKEN:
        raise metadata.fail("ggml.tokens", longest, f"{_MAX_TOKEN} characters each")
    types = metadata.numbers("ggml.token_type", len(tokens), 1.0)
    named = [_token_id(metadata, key, len(tokens)) for key in _END_KEYS]
    return GGUFTokens(
        tokens=tokens,
        types=types,
        eos_ids=tuple(end_tokens(tokens, types, named)),
        bos_id=_token_id(metadata, "bos", len(tokens)),
        add_bos=metadata.get("ggml.add_bos_token", bool),
    )


def _byte_level(metadata: _Metadata, found: GGUFTokens) -> tokenizers.Tokenizer:
    pre = metadata.get("ggml.pre", str)
    if pre not in FAMILIES:
        raise metadata.unsupported("ggml.pre", pre, f"one of {', '.join(FAMILIES)}")
    lines = metadata.get("ggml.merges", list, [])
    merges: list[tuple[str, str]] = []
    for line in lines:
        pair = line.split(" ") if isinstance(line, str) else ()
        if len(pair) != 2:
            raise metadata.fail("ggml.merges", line, "two tokens, a space between them")
        merges.append((pair[0], pair[1]))
    vocab = {token: number for number, token in enumerate(found.tokens)}
    return FAMILIES[pre](vocab, merges)


def _sentencepiece(metadata: _Metadata, found: GGUFTokens) -> tokenizers.Tokenizer:
    scores = metadata.numbers("ggml.scores", len(found.tokens), 0.0)
    bad = next((score for score in scores if not math.isfinite(score)), None)
    if bad is not None:
        raise metadata.fail("ggml.scores", bad, "finite numbers")
    if "tokenizer.ggml.scores" not in metadata.header.metadata:
        raise metadata.fail("ggml.scores", None, "one score a token")
    unknown = _token_id(metadata, "unknown", len(found.tokens))
    if unknown is None and found.types[0] == _UNKNOWN:
        unknown = 0
    unmergeable = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    return sentencepiece_bpe(
        found.tokens,
        scores,
        [kind not in unmergeable for kind in found.types],
        unknown=None if unknown is None else found.tokens[unknown],
        add_space_prefix=metadata.get("ggml.add_space_prefix", bool, True),
    )


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer | None:
    """Builds the tokenizer that GGUF metadata describe.

    Args:
      header: The file's header.

    Returns:
      The tokenizer, None if the file has none.

    Raises:
      UnsupportedTokenizer: It is of a kind that is not supported.
      CheckpointError: The metadata are damaged.
    """
    metadata = _Metadata(header)
    kind = metadata.get("ggml.model", str)
    found = gguf_tokens(header)
    if found is None:
        return None
    if kind not in _KINDS:
        raise metadata.unsupported(
            "ggml.model", kind, "'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE)"
        )
    ends = {found.tokens[number] for number in found.eos_ids}
    added = [
        tokenizers.AddedToken(
            token,
            # An end that a file holds as a plain token is one nevertheless.
            special=type_ in (_CONTROL, _UNKNOWN) or token in ends,
            normalized=False,
        )
        for token, type_ in zip(found.tokens, found.types, strict=True)
        if token and (type_ in (_CONTROL, _USER_DEFINED, _UNKNOWN) or token in ends)
    ]
    try:
        backend = _KINDS[kind](metadata, found)
        backend.add_special_tokens([token for token in added if token.special])
        backend.add_tokens([token for token in added if not token.special])
    except CheckpointError:
        raise
    except BaseException as error:
        if not failed_inside(error):
            raise
        raise metadata.fail("ggml.merges", str(error), "pairs of tokens") from error
    bos_id, add_bos = found.bos_id, found.add_bos
    if add_bos is None:
        add_bos = kind == "llama" or metadata.get("ggml.pre", str) in ADDS_BOS
    names = {}
    for key, name in _NAMES.items():
        token_id = _token_id(metadata, key, len(found.tokens))
        if token_id is not None:
            names[name] = found.tokens[token_id]
    return Tokenizer(
        backend,
        where=str(header.path),
        eos_ids=found.eos_ids,
        bos_id=bos_id,
        add_bos=add_bos,
        chat_source=metadata.get("chat_template", str),
        tool_source=metadata.get("chat_template.tool_use", str),
        names=names,
    )
