"""`sparda chat`: a conversation, several turns on one cache."""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError, choice, path, text
from sparda_jax.cli.cache_options import add_cache_options, cache_config
from sparda_jax.cli.console import advance, note, prefill_bar, rate_text
from sparda_jax.cli.figures import live_text, output_record, stats_lines
from sparda_jax.cli.generate import add_chat_arg_option, read_document
from sparda_jax.cli.live import LiveLine
from sparda_jax.cli.model_options import PREFILL_CHUNK, add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.cli.sampling_options import add_sampling_options, sampling_values
from sparda_jax.config import CacheKind
from sparda_jax.engine.chat import ChatOutput
from sparda_jax.engine.conversation import Conversation
from sparda_jax.engine.model import LanguageModel
from sparda_jax.evaluation.passkey import question_messages

# A cache that evicts is read by no further turn.
_KINDS = tuple(kind for kind in get_args(CacheKind) if kind != "evict")
_EXAMPLES = """\
examples:
  sparda chat
      talk to the default model
  sparda chat --document book.txt --attention sparda --cache offload
      ask about a long document, with its KV in host memory
  printf 'Name a colour.\\nAnd another?\\n' | sparda chat --max-new-tokens 16
      one message a line, from a pipe
"""
_COMMANDS = """\
/attention NAME   choose blocks in another way; the next turn reads all again
/cache KIND       resident, offload or auto; the next turn reads all again
/fork [NAME]      keep this point of the conversation (name: 1, 2, …)
/back [NAME]      go back to a point that was kept (the last one)
/reset            forget all messages
/stats            figures of the last turn in full
/help             this list
/quit             end (so does the end of the input, Ctrl-D)
Ctrl-C ends an answer; what has come of it stays in the conversation."""


def add_chat_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "chat",
        help="a conversation, several turns on one cache",
        description="A conversation with a model that has a chat template: every turn "
        "prefills only what is new. Answers go to standard output, figures of each "
        "turn to standard error. Lines that begin with / are commands:\n\n" + _COMMANDS,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_model_options(parser)
    add_cache_options(parser)
    add_option(
        parser, "--system", text, metavar="TEXT", help="a system message to begin with"
    )
    add_option(
        parser,
        "--document",
        path,
        metavar="F",
        help="a UTF-8 file that the first message is about",
    )
    add_chat_arg_option(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON a turn, answer and figures, in place of the answer",
    )
    parser.set_defaults(run=_chat)


@dataclasses.dataclass(frozen=True)
class _Point:
    """A point of the conversation.

    Attributes:
      messages: All so far.
      conversation: Their cache; None if the next turn reads them anew.
    """

    messages: list[dict[str, Any]]
    conversation: Conversation | None = None

    def fork(self) -> "_Point":
        held = self.conversation
        return _Point(list(self.messages), None if held is None else held.fork())


class _Chat:
    """The state of one `sparda chat`."""

    def __init__(self, lm: LanguageModel, arguments: argparse.Namespace):
        self.lm = lm
        self._options = sampling_values(arguments)
        self._chat_args = dict(arguments.chat_arg)
        self._json = arguments.json
        document = arguments.document
        self._document = document and read_document("--document", document)
        system = arguments.system
        self._first = [{"role": "system", "content": system}] if system else []
        self._point = _Point(list(self._first))
        self._kept: dict[str, _Point] = {}
        self._last: ChatOutput | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "attention": self._attention,
            "cache": self._cache,
            "fork": self._fork,
            "back": self._back,
            "reset": self._reset,
            "stats": self._stats,
            "help": lambda _: note(_COMMANDS),
        }

    def take(self, line: str) -> bool:
        """Takes one line; returns whether the conversation goes on."""
        if not line.startswith("/"):
            self._turn(line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        command = self._commands.get(name)
        if command is None:
            known = ", ".join(f"/{known}" for known in (*self._commands, "quit"))
            raise ConfigError(f"/{name} is no command: it must be one of {known}")
        command(rest.strip())
        return True

    def _turn(self, line: str) -> None:
        begins = len(self._point.messages) == len(self._first)
        if begins and self._document:
            new = question_messages(self._document, line)
        else:
            new = [{"role": "user", "content": line}]
        # A turn uses up its conversation: what fails later leaves the messages, which
        # are then read anew.
        point, self._point = self._point, _Point(self._point.messages)
        held = point.conversation.lengths[0] if point.conversation else 0
        messages = [*point.messages, *new]
        try:
            answer = sj.stream_chat(
                self.lm,
                messages,
                chat_args=self._chat_args,
                conversation=point.conversation,
                prefill_chunk=PREFILL_CHUNK,
                on_progress=lambda tokens: advance(bar, tokens),
                **self._options,
            )
        except (ConfigError, CheckpointError):
            self._point = point
            raise
        with prefill_bar(answer.prompt_tokens) as bar, LiveLine() as live:
            with _interrupt_noted() as interrupted:
                for event in answer:
                    bar.close()
                    if not self._json:
                        print(event.text, end="", flush=True)
                    if live.due() and (stats := answer.stats) is not None:
                        live.show(live_text(stats))
                    if interrupted():
                        break
        output = answer.cancel() if answer.output is None else answer.output
        print(output_record(self.lm, output.output, output.text) if self._json else "")
        self._point = _Point(output.messages, output.conversation)
        self._last = output
        stats = output.stats
        note(
            f"[{held} tokens held, {stats.prompt_tokens} read at "
            f"{rate_text(stats.prefill_tokens_per_second)} tokens/s; "
            f"{live_text(stats)}; {output.finish_reason}]"
        )

    def _anew(self, **changes: Any) -> None:
        """Goes on with another model setting, which another cache is made with."""
        self._point = _Point(self._point.messages)
        # Points that were kept have caches of the setting before.
        self._kept = {name: _Point(p.messages) for name, p in self._kept.items()}

    def _attention(self, name: str) -> None:
        name = choice(*sj.selector_names())("/attention", name)
        self.lm = sj.with_attention(self.lm, name)
        self._anew()
        note(f"[attention {name}; the next turn reads the conversation again]")

    def _cache(self, kind: str) -> None:
        chosen: Any = choice(*_KINDS)("/cache", kind)
        cache = dataclasses.replace(self.lm.cache, kind=chosen)
        self.lm = dataclasses.replace(self.lm, cache=cache)
        self._anew()
        note(f"[cache {kind}; the next turn reads the conversation again]")

    def _fork(self, name: str) -> None:
        name = name or str(len(self._kept) + 1)
        # A name that is used again stands last.
        self._kept.pop(name, None)
        self._kept[name] = self._point.fork()
        note(f"[kept as {name}: {len(self._point.messages)} messages]")

    def _back(self, name: str) -> None:
        if not self._kept:
            raise ConfigError("/back has no point to go back to: /fork keeps one")
        name = choice(*self._kept)("/back", name) if name else [*self._kept][-1]
        self._point = self._kept[name].fork()
        note(f"[back at {name}: {len(self._point.messages)} messages]")

    def _reset(self, _: str) -> None:
        self._point = _Point(list(self._first))
        note("[all messages are forgotten]")

    def _stats(self, _: str) -> None:
        if self._last is None:
            raise ConfigError("/stats has nothing to show before the first turn")
        note("\n".join(stats_lines(self._last.stats, self.lm)))


@contextlib.contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted, so that a turn's state stays whole.

    A second one interrupts as ever.
    """
    noted = False

    def note_it(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """Lines that are typed, or come through a pipe; until their end."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # Editing and history of `input`.
        note("Type a message; /help lists the commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            found = error.object[error.start]
            raise ConfigError(
                f"standard input is not {error.encoding}: it has a byte {found:#04x}"
            ) from error
        if not (line or typed):
            return
        if line.strip():
            yield line.strip()


def _chat(arguments: argparse.Namespace) -> None:
    cache = cache_config(arguments)
    choice(*_KINDS)("--cache", cache.kind)
    lm = dataclasses.replace(load_model(arguments, arguments.attention), cache=cache)
    if lm.tokenizer is None:
        raise ConfigError(f"{lm.no_tokenizer}: chat needs one")
    if not lm.tokenizer.has_chat_template:
        raise ConfigError(
            f"chat needs a model with a chat template: {lm.config.name!r} has none"
        )
    chat = _Chat(lm, arguments)
    for line in _lines():
        try:
            if not chat.take(line):
                return
        except (ConfigError, CheckpointError) as error:
            # A slip of a person who types is told; in a script it ends the run.
            if not sys.stdin.isatty():
                raise
            note(f"sparda: {error}")
