"""Text to token ids and back, from GGUF metadata or a Hugging Face directory."""

import codecs
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparda_jax.checkpoint.end_tokens import end_tokens
from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import is_file, read_json, read_text
from sparda_jax.checkpoint.gguf_header import GGUFHeader

if TYPE_CHECKING:
    from sparda_jax.checkpoint.chat import ChatTemplate

_MAX_TEMPLATE = 1 << 20  # Bytes; the longest templates in use have 30,000.
_MAX_TOKENIZER = 1 << 28  # The largest tokenizer.json in use has about 40 MB.
_HELD = 8  # Tokens after which an unfinished character is given up.

# Token types of GGUF.
_CONTROL, _USER_DEFINED = 3, 4

# One pattern a pre-tokenizer family; they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@runtime_checkable
class TokenStream(Protocol):
    """Turns the tokens of one answer into text as they come."""

    def push(self, token_id: int) -> str:
        """Returns the text that is complete with this token, maybe none."""
        ...

    def flush(self) -> str:
        """Returns what is left; an unfinished character becomes U+FFFD."""
        ...


@functools.cache
def _byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the
    characters from U+0100 on, in order.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    table = {chr(byte): byte for byte in plain}
    table.update((chr(256 + n), byte) for n, byte in enumerate(others))
    return table


class _ByteStream:
    """Stream of a byte-level tokenizer: exact, one incremental UTF-8 decoder."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Stream of any other tokenizer: decodes the last tokens again, with the new one.

    The tokens before them give the context that a decoder may need (a leading space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # Tokens of _ids whose text is out.

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        held = len(self._ids) - self._shown
        if self._decode(self._ids).endswith("\ufffd") and held < _HELD:
            return ""
        return self.flush()

    def flush(self) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]


class Tokenizer:
    """A model's tokenizer.

    Attributes:
      vocab_size: All tokens.
      plain_vocab_size: Tokens without those that were added later; fine-tuned models
        may have added some (padding) for which there is no row of weights.
      eos_ids: Tokens that end an answer, each once.
      bos_id: The token that begins a text, None if the model has none.
      add_bos: Whether a plain prompt begins with `bos_id`.
      chat_source: Source of the chat template, None if there is none.

    Args:
      backend: The tokenizer of the `tokenizers` library.
      where: The file, for messages.
      eos_ids, bos_id, add_bos, chat_source: As above.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        where: str,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        add_bos: bool = False,
        chat_source: str | None = None,
    ) -> None:
        self._backend = backend
        self._where = where
        # Whether special tokens are parsed is a switch of the backend, not an argument.
        self._lock = threading.Lock()
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self.plain_vocab_size: int = backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self.chat_source = chat_source

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; no token is added before or after.

        Args:
          text: Any text.
          special: Read the names of special tokens, such as `<|im_end|>`, as these
            tokens. Only for text that is trusted: a chat template's output, not a
            document.

        Returns:
          The ids.

        Raises:
          ValueError: `text` is not a string, or holds a lone surrogate.
        """
        with self._lock:
            self._backend.encode_special_tokens = not special
            try:
                return self._backend.encode(text, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError) as error:
                # The library says the same of a lone surrogate and of a number.
                raise ValueError(
                    f"text = {show(text)} is not a string of valid Unicode"
                ) from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids.

        Args:
          ids: Token ids; those that the tokenizer does not know give no text.
          skip_special: Leave special tokens out.

        Returns:
          The text; bytes that are no UTF-8 become U+FFFD.
        """
        plain = [int(token_id) for token_id in ids]
        return self._backend.decode(plain, skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """Returns a new stream: the texts of its pushes join to `decode` of all ids."""
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return _ByteStream(
                functools.partial(self._token_bytes, skip_special=skip_special)
            )
        return _WindowStream(functools.partial(self.decode, skip_special=skip_special))

    def _token_bytes(self, token_id: int, *, skip_special: bool) -> bytes:
        token = self._backend.id_to_token(int(token_id))
        if token is None or (skip_special and token_id in self._special_ids):
            return b""
        table = _byte_values()
        values = [table.get(character) for character in token]
        # A token with a character outside the byte alphabet (an added one with a
        # space, for instance) stands for its own text.
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode()

    @functools.cached_property
    def _bytes_of_all(self) -> list[bytes]:
        ids = range(self.vocab_size)
        return [self._token_bytes(token_id, skip_special=True) for token_id in ids]

    def tokens_with(self, byte_values: Set[int]) -> list[int] | None:
        """Ids of the tokens whose UTF-8 holds one of these bytes.

        None for a tokenizer that is not byte-level: what a token adds to the text then
        depends on those before it. Special tokens have no text.
        """
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        every = enumerate(self._bytes_of_all)
        return [index for index, held in every if not byte_values.isdisjoint(held)]

    def token(self, token_id: int) -> str | None:
        """The token's own string, None if there is no such id."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its own string, None if there is none."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self._backend.to_str()

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self.chat_source is not None

    @functools.cached_property
    def _chat(self) -> "ChatTemplate":
        # Jinja is imported by those who use a template: it takes 70 ms.
        from sparda_jax.checkpoint.chat import ChatTemplate

        if self.chat_source is None:
            raise CheckpointError(f"{self._where}: the model has no chat template")
        names = {}
        if self.bos_id is not None:
            names["bos_token"] = self.token(self.bos_id) or ""
        if self.eos_ids:
            names["eos_token"] = self.token(self.eos_ids[0]) or ""
        return ChatTemplate(self.chat_source, self._where, names)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes a conversation in the model's own form.

        Encode the result with `special=True`.

        Args:
          messages: Each with `role` and `content`.
          add_generation_prompt: End with the opening of the assistant's answer.
          **variables: Further variables of the template, such as `tools` or
            `enable_thinking`.

        Returns:
          The text.

        Raises:
          ConfigError: `messages` is empty or malformed, or a variable is no JSON.
          CheckpointError: There is no template, or it failed.
        """
        return self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = tokenizers.Regex(_WORDS.format(digits=digits))
    words = pre_tokenizers.Split(pattern, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, _byte_level(use_regex=False)])


def _smollm(
    vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, _byte_level(use_regex=True)]
    )
    return backend


def _qwen2(
    vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _split_words("")
    return backend


def _llama3(
    vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    # A word that is a token is taken whole, without asking the merges.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = _split_words("{1,3}")
    return backend


_PRE = {
    "smollm": _smollm,
    "qwen2": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3")  # Unless the file says otherwise.


def _failed(error: BaseException) -> bool:
    """Whether `error` is a failure inside the `tokenizers` library.

    It raises plain Exception for bad input; a panic of its Rust code is a
    BaseException of a class that cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer | None:
    """Builds the tokenizer that GGUF metadata describe.

    Args:
      header: The file's header.

    Returns:
      The tokenizer, None if the file has none.

    Raises:
      CheckpointError: The metadata are damaged or of a kind that is not supported.
    """
    metadata = header.metadata

    def fail(key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{header.path}: GGUF tokenizer.{key} = {show(value)}, allowed: {allowed}"
        )

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.{key}", default)
        exact = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if value is not None and not exact:
            raise fail(key, value, f"a value of type {kind.__name__}")
        return value

    def get_id(key: str) -> int | None:
        value = get(f"ggml.{key}_token_id", int)
        if value is not None and not 0 <= value < len(tokens):
            raise fail(f"ggml.{key}_token_id", value, f"0 to {len(tokens) - 1}")
        return value

    model = get("ggml.model", str)
    if model in (None, "none", "no_vocab"):
        return None
    if model != "gpt2":
        raise fail("ggml.model", model, "'gpt2' (byte-level BPE)")
    pre = get("ggml.pre", str)
    if pre not in _PRE:
        raise fail("ggml.pre", pre, f"one of {', '.join(_PRE)}")
    tokens: list[str] = get("ggml.tokens", list, [])
    merges = [tuple(merge.split(" ")) for merge in get("ggml.merges", list, [])]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens):
        raise fail("ggml.tokens", len(tokens), "a list of distinct tokens")
    bad = next((merge for merge in merges if len(merge) != 2), None)
    if bad is not None:
        raise fail("ggml.merges", " ".join(bad), "two tokens, a space between them")
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if isinstance(kinds, str) or not hasattr(kinds, "__len__"):
        raise fail("ggml.token_type", kinds, "a list of numbers")
    if len(kinds) != len(tokens):
        raise fail("ggml.token_type", len(kinds), f"one type a token ({len(tokens)})")
    added = [
        tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    try:
        backend = _PRE[pre](vocab, merges)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([token for token in added if token.special])
        backend.add_tokens([token for token in added if not token.special])
    except BaseException as error:
        if not _failed(error):
            raise
        raise fail("ggml.merges", str(error), "pairs of tokens") from error
    named = [get_id(key) for key in _END_KEYS]
    return Tokenizer(
        backend,
        where=str(header.path),
        eos_ids=end_tokens(tokens, kinds, named),
        bos_id=get_id("bos"),
        add_bos=get("ggml.add_bos_token", bool, pre in _ADDS_BOS),
        chat_source=get("chat_template", str),
    )


def _token_text(value: object) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _directory_template(
    directory: pathlib.Path, settings: Mapping[str, Any]
) -> str | None:
    path = directory / "chat_template.jinja"
    text = read_text(path, _MAX_TEMPLATE)
    if text is not None:
        return text
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: chat_template = {show(template)}, "
            "allowed: a string, or a list with one named 'default'"
        )
    return template


def _token_ids(path: pathlib.Path, field: str, value: object) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(
                f"{path}: {field} = {show(value)}, allowed: a token id or a list of ids"
            )
    return ids


def eos_ids_of(directory: pathlib.Path, config: Mapping[str, Any]) -> list[int]:
    """End tokens that a directory names, generation_config.json before config.json."""
    generation = directory / "generation_config.json"
    for path, values in (
        (generation, read_json(generation) or {}),
        (directory / "config.json", config),
    ):
        if values.get("eos_token_id") is not None:
            return _token_ids(path, "eos_token_id", values["eos_token_id"])
    return []


def tokenizer_from_directory(
    directory: str | os.PathLike, config: Mapping[str, Any]
) -> Tokenizer | None:
    """Builds the tokenizer of a Hugging Face directory.

    Args:
      directory: Holds tokenizer.json, and maybe tokenizer_config.json,
        chat_template.jinja and generation_config.json.
      config: Contents of its config.json.

    Returns:
      The tokenizer, None if there is no tokenizer.json.

    Raises:
      CheckpointError: One of the files is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer.json"
    if not is_file(path):
        return None
    settings = read_json(directory / "tokenizer_config.json") or {}
    size = path.stat().st_size
    if size > _MAX_TOKENIZER:
        raise CheckpointError(f"{path}: {size} bytes, allowed: {_MAX_TOKENIZER}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        # Lengths are the caller's business; a file may carry those of its training.
        backend.no_truncation()
        backend.no_padding()
        opening = backend.encode("a").ids[:1]
    except BaseException as error:
        if not _failed(error):
            raise
        raise CheckpointError(f"{path}: is no valid tokenizer: {error}") from error
    bos_text = _token_text(settings.get("bos_token"))
    bos_id = None if bos_text is None else backend.token_to_id(bos_text)
    if bos_id is None and config.get("bos_token_id") is not None:
        found = _token_ids(
            directory / "config.json", "bos_token_id", config["bos_token_id"]
        )
        bos_id = found[0] if found else None
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos_id is not None and opening == [bos_id]
    eos_ids = eos_ids_of(directory, config)
    eos_text = _token_text(settings.get("eos_token"))
    eos_id = None if eos_text is None else backend.token_to_id(eos_text)
    if eos_id is not None:
        # The template's own end of turn comes first: it is its `eos_token`.
        eos_ids = [eos_id, *eos_ids]
    return Tokenizer(
        backend,
        where=str(directory),
        eos_ids=eos_ids,
        bos_id=bos_id,
        add_bos=add_bos,
        chat_source=_directory_template(directory, settings),
    )
