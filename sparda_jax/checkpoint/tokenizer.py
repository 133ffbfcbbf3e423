"""Text to token ids and back."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, cast

import tokenizers
from tokenizers import decoders, pre_tokenizers

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.tokenizers.streams import (
    ByteStream,
    TokenStream,
    WindowStream,
    byte_values,
)

if TYPE_CHECKING:
    from sparda_jax.checkpoint.chat import ChatTemplate
    from sparda_jax.checkpoint.content_marks import ContentMarks


def failed_inside(error: BaseException) -> bool:
    """Whether `error` is a failure inside the `tokenizers` library.

    It raises plain Exception for bad input; a panic of its Rust code is a
    BaseException of a class that cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _metaspaces(
    backend: tokenizers.Tokenizer,
) -> Iterator[pre_tokenizers.Metaspace]:
    """The pre-tokenizers that put a space before a text, but not before its parts."""
    whole: Any = backend.pre_tokenizer
    is_sequence = isinstance(whole, pre_tokenizers.Sequence)
    parts = [whole[n] for n in range(len(cast(Any, whole)))] if is_sequence else [whole]
    for part in parts:
        if isinstance(part, pre_tokenizers.Metaspace) and (
            part.prepend_scheme == "first"
        ):
            yield part


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
      tool_source: Source of the one for conversations with tools, None if it is the
        same.

    Args:
      backend: The tokenizer of the `tokenizers` library.
      where: The file, for messages.
      eos_ids, bos_id, add_bos, chat_source, tool_source: As above.
      names: Variables of the chat template that name tokens, such as `pad_token`;
        `bos_token` and `eos_token` are known from the ids.
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
        tool_source: str | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self._where = where
        # Whether special tokens are parsed is a switch of the backend, not an argument.
        self._lock = threading.Lock()
        added = backend.get_added_tokens_decoder()
        self._special = {n: token for n, token in added.items() if token.special}
        self.plain_vocab_size: int = backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self.chat_source = chat_source
        self.tool_source = tool_source
        self._names = dict(names or {})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; no token is added before or after.

        Args:
          text: Any text.
          special: Read the names of special tokens, such as `<|im_end|>`, as these
            tokens. Only for text that is trusted: a chat template's output, not a
            document; see `encode_chat`.

        Returns:
          The ids.

        Raises:
          ValueError: `text` is not a string, or holds a lone surrogate.
          CheckpointError: The tokenizer fails on this text.
        """
        if special:
            return self._encoding(text, special=True).ids
        return self._encode_inside(text, 0, len(text))

    def _encoding(
        self, text: str, special: bool, *, begins: bool = True
    ) -> tokenizers.Encoding:
        """The library's encoding; `begins` says that no other text is before it."""
        with self._lock, contextlib.ExitStack() as stack:
            if not begins:
                for part in _metaspaces(self._backend):
                    part.prepend_scheme = "never"
                    stack.callback(setattr, part, "prepend_scheme", "first")
            self._backend.encode_special_tokens = not special
            try:
                return self._backend.encode(text, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError) as error:
                # The library says the same of a lone surrogate and of a number.
                raise ValueError(
                    f"text = {show(text)} is not a string of valid Unicode"
                ) from error
            except BaseException as error:
                if not failed_inside(error):
                    raise
                raise CheckpointError(
                    f"{self._where}: the tokenizer fails on {show(text)}: {error}"
                ) from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids.

        Args:
          ids: Token ids; those that the tokenizer does not know give no text.
          skip_special: Leave special tokens out.

        Returns:
          The text; bytes that are no UTF-8 become U+FFFD.

        Raises:
          CheckpointError: The tokenizer fails on these ids.
        """
        plain = [int(token_id) for token_id in ids]
        try:
            return self._backend.decode(plain, skip_special_tokens=skip_special)
        except BaseException as error:
            if not failed_inside(error):
                raise
            raise CheckpointError(
                f"{self._where}: the tokenizer fails on {show(plain)}: {error}"
            ) from error

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """Returns a new stream: the texts of its pushes join to `decode` of all ids."""
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return ByteStream(
                functools.partial(self._token_bytes, skip_special=skip_special)
            )
        return WindowStream(functools.partial(self.decode, skip_special=skip_special))

    def _token_bytes(self, token_id: int, *, skip_special: bool) -> bytes:
        token = self._backend.id_to_token(int(token_id))
        if token is None or (skip_special and token_id in self._special):
            return b""
        table = byte_values()
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

    def _chat_for(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        """The template of a conversation: with tools some models have another one."""
        if variables.get("tools") is not None and self.tool_source is not None:
            return self._tool_chat
        return self._chat

    @functools.cached_property
    def _chat(self) -> "ChatTemplate":
        return self._template(self.chat_source)

    @functools.cached_property
    def _tool_chat(self) -> "ChatTemplate":
        return self._template(self.tool_source)

    def _template(self, source: str | None) -> "ChatTemplate":
        from sparda_jax.checkpoint.chat import ChatTemplate

        if source is None:
            raise CheckpointError(f"{self._where}: the model has no chat template")
        names = dict(self._names)
        if self.bos_id is not None:
            names.setdefault("bos_token", self.token(self.bos_id) or "")
        if self.eos_ids:
            names.setdefault("eos_token", self.token(self.eos_ids[0]) or "")
        return ChatTemplate(source, self._where, names)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes a conversation in the model's own form.

        `encode_chat` gives its token ids. This text encoded with `special=True` gives
        the same unless contents hold the names of special tokens.

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
        return self._chat_for(variables).render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer_prefix: str = "",
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's own form.

        Only the template's own markers become special tokens. The name of one inside a
        message, a tool, another variable or `answer_prefix` stays text.

        Args:
          messages: Each with `role` and `content`.
          answer_prefix: How the answer begins, after the template's output.
          add_generation_prompt: End with the opening of the assistant's answer.
          **variables: Further variables of the template, such as `tools` or
            `enable_thinking`; those whose name ends with `_token` name special tokens.

        Returns:
          The ids.

        Raises:
          ConfigError: `messages` is empty or malformed, or a variable is no JSON.
          CheckpointError: There is no template, or it failed.
        """
        from sparda_jax.checkpoint.chat import chat_variables
        from sparda_jax.checkpoint.content_marks import ContentMarks

        template = self._chat_for(variables)
        given = chat_variables(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )
        contents = {n: v for n, v in given.items() if not n.endswith("_token")}
        marks = ContentMarks(
            [token.content for token in self._special.values()],
            template.source,
            [answer_prefix, *contents.values()],
            self._normalizer(),
        )
        marked = {name: marks.mark(value) for name, value in contents.items()}
        output = self._render_marked(template, marks, given, marked)
        marked_text = marks.found(output) + marks.mark(answer_prefix)
        text = marks.restore(marked_text)
        whole = self._encoding(text, special=True)
        if marked_text == text:
            return whole.ids
        own = self._special_places(
            marked_text, self._encoding(marked_text, special=True)
        )
        if own == self._special_places(text, whole):
            return whole.ids
        return self._encode_between(text, own)

    def _render_marked(
        self,
        template: "ChatTemplate",
        marks: "ContentMarks",
        given: Mapping[str, Any],
        marked: Mapping[str, Any],
    ) -> str:
        """What the template makes of marked contents: as of plain ones, if it can be.

        A template that looks for a marker in contents does not find it where it is
        marked; it is then rendered with what it looks for marked likewise, if that
        gives the text that it gives for plain contents.
        """
        output = template.render_variables({**given, **marked})
        seeking = marks.seeking(template.source, [given[name] for name in marked])
        if seeking is None:
            return output
        plain = template.render_variables(given)
        other = self._template(seeking)
        try:
            found = other.render_variables({**given, **marked})
        except CheckpointError:
            return output
        finally:
            other.close()
        return found if marks.restore(marks.found(found)) == plain else output

    def _normalizer(self) -> Callable[[str], str] | None:
        """What is done to a text before special tokens are looked for, if anything."""
        if self._backend.normalizer is None or not any(
            token.normalized for token in self._special.values()
        ):
            return None
        return self._backend.normalizer.normalize_str

    def _special_places(
        self, text: str, encoding: tokenizers.Encoding
    ) -> list[tuple[int, int, int]]:
        """Begin, end and id of each special token that was read from its name."""
        if self._special.keys().isdisjoint(encoding.ids):
            return []
        unknown = getattr(self._backend.model, "unk_token", None)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [
            (begin, end, token_id)
            for token_id, (begin, end) in found
            if token_id in self._special
            # Characters that no token stands for give this one as well.
            and (
                self._special[token_id].content != unknown
                or text[begin:end].strip() == unknown
            )
        ]

    def _encode_between(
        self, text: str, places: Sequence[tuple[int, int, int]]
    ) -> list[int]:
        """Ids of a text whose special tokens are at `places` and nowhere else."""
        ids: list[int] = []
        begin = 0
        for start, end, token_id in places:
            ids += [*self._encode_inside(text, begin, start), token_id]
            begin = end
        return ids + self._encode_inside(text, begin, len(text))

    def _encode_inside(self, text: str, begin: int, end: int) -> list[int]:
        """Ids of a part of a text, without special tokens."""
        encoding = self._encoding(text[begin:end], special=False, begins=begin == 0)
        places = self._special_places(text[begin:end], encoding)
        if not places or end - begin <= 1:
            return encoding.ids
        # Some models hold a special token's name as a piece of text as well.
        middle = begin + (places[0][0] + places[0][1]) // 2
        middle = min(max(middle, begin + 1), end - 1)
        return [
            *self._encode_inside(text, begin, middle),
            *self._encode_inside(text, middle, end),
        ]
