"""`chat`: an answer to messages, and only what is new in the turns that follow."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checks import (
    ConfigError,
    function,
    instance,
    integer,
    optional,
    require,
    text,
)
from sparda_jax.engine.api import generate, stream
from sparda_jax.engine.conversation import ChatHistory, Conversation
from sparda_jax.engine.generate_config import GenerateConfig, merge_options
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import LANGUAGE_MODEL
from sparda_jax.engine.results import GenerateOutput, GenerateStats, StreamEvent
from sparda_jax.engine.stream import Stream

type Message = Mapping[str, Any]

# What `generate` takes and chat passes on.
_OPTIONS = {field.name for field in dataclasses.fields(GenerateConfig)} - {"n"}
# What `chat` itself passes to the template.
_OWN_ARGS = {"self", "messages", "answer_prefix", "add_generation_prompt"}
# Answers that share no token, to find out what a template writes around one.
_STAND_INS = ("yes", "no")


@dataclasses.dataclass(frozen=True, eq=False)
class ChatOutput:
    """What `chat` returns.

    Attributes:
      messages: The messages that were given, and the answer.
      output: Tokens, finish reason and figures.
      conversation: To go on with `chat(..., conversation=...)`.
    """

    messages: list[dict[str, Any]]
    output: GenerateOutput
    conversation: Conversation

    @property
    def text(self) -> str:
        """The answer."""
        return self.messages[-1]["content"]

    @property
    def finish_reason(self) -> str:
        """As `GenerateOutput.finish_reasons`."""
        return self.output.finish_reasons[0]

    @property
    def stats(self) -> GenerateStats:
        """As `GenerateOutput.stats`."""
        return self.output.stats

    def __repr__(self) -> str:
        return f"ChatOutput({len(self.messages)} messages, {self.output!r})"


def chat(
    lm: LanguageModel,
    messages: Sequence[Message],
    config: GenerateConfig | None = None,
    *,
    chat_args: Mapping[str, Any] | None = None,
    answer_prefix: str = "",
    conversation: Conversation | None = None,
    **options: Any,
) -> ChatOutput:
    """Answers messages in the model's own chat form.

    Only the template's own markers become control tokens: `<|im_end|>` in a document is
    text. (A rendered chat that is passed to `generate` as text is all text, its markers
    too; `lm.tokenizer.encode_chat` gives the token ids for `generate` and `stream`.)

    Args:
      lm: A loaded model whose tokenizer has a chat template.
      messages: All messages, each with `role` and `content`; in a further turn the
        `messages` of the output before and what is new.
      config: What to ask for, as in `generate`; of one output (`n` is 1).
      chat_args: Variables of the template, such as `tools` or `enable_thinking`.
      answer_prefix: Words that the answer begins with.
      conversation: From the output before: only what is new is prefilled, behind the
        answer's own tokens. It is used up; `fork` it to ask several questions.
      **options: As for `generate`, for one output: `max_new_tokens`, `stop`,
        `temperature`, …

    Returns:
      The answer, the messages with it, and the conversation to continue.

    Raises:
      ConfigError: If an argument is out of range, the model has no tokenizer or
        template, or the messages do not go on from the conversation's.
      CheckpointError: If the template fails.

    Example:
      >>> messages = [{"role": "user", "content": "Name a colour."}]
      >>> out = sj.chat(lm, messages, max_new_tokens=4)
      >>> out.messages[-1] == {"role": "assistant", "content": out.text}
      True
      >>> more = [*out.messages, {"role": "user", "content": "And another?"}]
      >>> again = sj.chat(lm, more, conversation=out.conversation, max_new_tokens=4)
      >>> len(again.messages)
      4
    """
    turn = _turn(lm, messages, config, chat_args, answer_prefix, conversation, options)
    output = generate(lm, [turn.new], turn.config, conversation=turn.conversation)
    return turn.answered(output)


class ChatStream:
    """An answer as it comes; see `stream_chat`. An iterator, consumed once."""

    def __init__(self, turn: "_Turn", events: Stream):
        self._turn, self._events = turn, events
        self._output: ChatOutput | None = None

    def __iter__(self) -> "ChatStream":
        return self

    def __next__(self) -> StreamEvent:
        return next(self._events)

    @property
    def stats(self) -> GenerateStats | None:
        """As `Stream.stats`."""
        return self._events.stats

    @property
    def prompt_tokens(self) -> int:
        """As `Stream.prompt_tokens`: tokens of what is new."""
        return self._events.prompt_tokens

    @property
    def output(self) -> ChatOutput | None:
        """What `chat` would return; None until a loop over it has ended."""
        if self._output is None and self._events.output is not None:
            self._output = self._turn.answered(self._events.output)
        return self._output

    def cancel(self) -> ChatOutput:
        """As `Stream.cancel`: the answer ends with the tokens that have come."""
        self._events.cancel()
        assert self.output is not None
        return self.output

    def __repr__(self) -> str:
        return f"ChatStream({self._events!r})"


def stream_chat(
    lm: LanguageModel,
    messages: Sequence[Message],
    config: GenerateConfig | None = None,
    *,
    chat_args: Mapping[str, Any] | None = None,
    answer_prefix: str = "",
    conversation: Conversation | None = None,
    tokens_per_call: int = 4,
    on_progress: Callable[[int], None] | None = None,
    **options: Any,
) -> ChatStream:
    """`chat`, yielding `StreamEvent`s as tokens come.

    The same answer as `chat`, which `output` is once the loop has ended.
    `tokens_per_call` and `on_progress` are those of `stream`; other arguments and
    errors are those of `chat`.

    Example:
      >>> messages = [{"role": "user", "content": "Name a colour."}]
      >>> answer = sj.stream_chat(lm, messages, max_new_tokens=4)
      >>> "".join(event.text for event in answer) == answer.output.text
      True
    """
    tokens_per_call = integer(1)("tokens_per_call", tokens_per_call)
    on_progress = optional(function)("on_progress", on_progress)
    turn = _turn(lm, messages, config, chat_args, answer_prefix, conversation, options)
    events = stream(
        lm,
        [turn.new],
        turn.config,
        conversation=turn.conversation,
        tokens_per_call=tokens_per_call,
        on_progress=on_progress,
    )
    return ChatStream(turn, events)


@dataclasses.dataclass(frozen=True, eq=False)
class _Turn:
    """Checked arguments of one answer.

    Attributes:
      messages: Those that were given.
      answer_prefix: What the answer begins with.
      config: What to ask for.
      prompt: Token ids of all messages, as the template writes them.
      new: Those to prefill.
      conversation: To append them to.
    """

    messages: list[dict[str, Any]]
    answer_prefix: str
    config: GenerateConfig
    prompt: tuple[int, ...]
    new: list[int]
    conversation: Conversation | None

    def answered(self, output: GenerateOutput) -> ChatOutput:
        """What `chat` returns for what was generated."""
        answer = {"role": "assistant", "content": self.answer_prefix + output.texts[0]}
        given = [*self.messages, answer]
        held = ChatHistory(tuple(copy.deepcopy(given)), self.prompt)
        return ChatOutput(
            given, output, dataclasses.replace(output.conversation, chat=held)
        )


def _turn(
    lm: LanguageModel,
    messages: Sequence[Message],
    config: GenerateConfig | None,
    chat_args: Mapping[str, Any] | None,
    answer_prefix: str,
    conversation: Conversation | None,
    options: Mapping[str, Any],
) -> _Turn:
    """Checks the arguments of `chat`, and settles what is to be prefilled."""
    for name in options.keys() - _OPTIONS:
        raise ConfigError(
            f"{name} is not allowed in chat, which gives one answer to one chat: it "
            f"must be one of {', '.join(sorted(_OPTIONS))}"
        )
    config = merge_options(config, options)
    require(config.n == 1, "n", config.n, "1 in chat, which gives one answer")
    tokenizer = _chat_tokenizer(LANGUAGE_MODEL("lm", lm))
    answer_prefix = text("answer_prefix", answer_prefix)
    variables = {} if chat_args is None else chat_args
    named = isinstance(variables, Mapping) and all(type(n) is str for n in variables)
    named = named and not _OWN_ARGS & variables.keys()
    require(named, "chat_args", chat_args, "a mapping of the template's own variables")
    listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    require(listed, "messages", messages, "a list of mappings with role and content")
    conversation = optional(instance(Conversation))("conversation", conversation)
    ids = tokenizer.encode_chat(messages, answer_prefix=answer_prefix, **variables)
    given = [dict(message) for message in copy.deepcopy(list(messages))]
    new = ids
    if conversation is not None:
        conversation.check_unused()
        history = _history(conversation, given)
        tail = _tail(tokenizer, history, given, answer_prefix, variables)
        conversation, new = _behind_answer(tokenizer, conversation, tail)
    return _Turn(given, answer_prefix, config, tuple(ids), new, conversation)


def _chat_tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise ConfigError(f"{lm.no_tokenizer}: chat needs one; use generate")
    if not lm.tokenizer.has_chat_template:
        raise ConfigError(
            f"model {lm.config.name!r} has no chat template: chat needs one; use "
            "generate"
        )
    return lm.tokenizer


def _history(conversation: Conversation, messages: list[dict[str, Any]]) -> ChatHistory:
    """What a conversation holds, if the messages go on from there."""
    history = conversation.chat
    if history is None:
        raise ConfigError(
            "conversation was not made by chat, or went on without it: chat knows no "
            "messages that it holds"
        )
    held = list(history.messages)
    for index, message in enumerate(held):
        if messages[index : index + 1] != [message]:
            raise ConfigError(
                f"messages[{index}] is not what the conversation holds: messages must "
                "be those of the output before, its answer too, and the new ones"
            )
    if len(messages) == len(held):
        raise ConfigError(
            f"messages has the {len(held)} that the conversation holds, and no new one"
        )
    return history


def _tail(
    tokenizer: Tokenizer,
    history: ChatHistory,
    messages: list[dict[str, Any]],
    answer_prefix: str,
    variables: Mapping[str, Any],
) -> list[int]:
    """Ids that the template puts behind the last answer, for the messages after it.

    The answer's own tokens are in the cache, and its text may be cut into tokens in
    another way, or be trimmed by the template. So it is rendered twice with other words
    in its place: what is the same behind both is the tail, and what is the same before
    both must be in the cache.
    """
    place = len(history.messages) - 1
    first, second = (
        tokenizer.encode_chat(
            [
                *messages[:place],
                {**messages[place], "content": words},
                *messages[place + 1 :],
            ],
            answer_prefix=answer_prefix,
            **variables,
        )
        for words in _STAND_INS
    )
    before = _common(first, second)
    behind = _common(reversed(first), reversed(second))
    shortest = min(len(first), len(second))
    if (
        tuple(first[:before]) != history.prompt[:before]
        or behind < 2
        or before + behind >= shortest
    ):
        raise ConfigError(
            "conversation cannot go on with these messages: the chat template now "
            "writes the earlier ones in another way (other chat_args?); leave it out"
        )
    return first[-behind:]


def _common(first: Iterable[int], second: Iterable[int]) -> int:
    """How many ids two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _behind_answer(
    tokenizer: Tokenizer, conversation: Conversation, tail: list[int]
) -> tuple[Conversation, list[int]]:
    """What to send so that the cache goes on with the tail.

    The answer's last token is sampled, but not in the cache yet. An end token gives way
    to the template's own end of a turn, with which the tail begins.
    """
    pending = int(np.asarray(conversation.state.pending)[0])
    if tokenizer.decode([pending]):
        return conversation, tail
    state = conversation.state
    replaced = jnp.full_like(state.pending, tail[0])
    state = state._replace(pending=replaced)
    return dataclasses.replace(conversation, state=state), tail[1:]
