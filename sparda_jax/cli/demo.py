"""`sparda demo`: a passkey in a long document, with every attention."""

import argparse
from typing import Any

import sparda_jax as sj
from sparda_jax.checks import integer, number
from sparda_jax.cli.console import (
    advance,
    prefill_bar,
    rate_text,
    share_text,
)
from sparda_jax.cli.model_options import PREFILL_CHUNK, add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.cli.sampling_options import add_seed_option
from sparda_jax.config import ConfigError
from sparda_jax.evaluation.passkey import passkey_task


def add_demo_parser(commands: Any) -> None:
    """Adds the subcommand."""
    demo = commands.add_parser(
        "demo",
        help="find a passkey in a long document with every attention",
        description=(
            "Builds a document from Python's own manual, hides a passkey in it, asks "
            "for it, and shows for dense, infllm_v2 and sparda the answer, the speed "
            "and the share of KV blocks that decode read."
        ),
        formatter_class=HelpFormatter,
    )
    add_model_options(demo, attention=False)
    add_option(
        demo,
        "--tokens",
        integer(1),
        metavar="N",
        default=4000,
        help="length of the prompt",
    )
    add_option(
        demo,
        "--depth",
        number(least=0, most=1),
        metavar="X",
        default=0.35,
        help="0 start … 1 end",
    )
    add_seed_option(demo, "of the document")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    lm = load_model(arguments, "dense")
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
        f"{task.answer} at {task.depth:.0%} of it; budget {lm.sparse.budget_text} of "
        f"{-(-len(task.ids) // lm.sparse.block_size)} KV blocks\n"
    )
    print(
        f"{'attention':10} {'answer':12} {'found':5} {'prefill':>10} {'decode':>10} "
        f"{'KV blocks read':>15} {'compile':>8}"
    )
    for name in ("dense", "infllm_v2", "sparda"):
        chosen = sj.with_attention(lm, name)
        with prefill_bar(len(task.ids)) as bar:
            bar.set_description(name)
            stream = sj.stream(
                chosen,
                [list(task.ids)],
                max_new_tokens=12,
                prefill_chunk=PREFILL_CHUNK,
                on_progress=lambda tokens, bar=bar: advance(bar, tokens),
            )
            text = "".join(event.text for event in stream)
        assert stream.output is not None
        stats = stream.output.stats
        answer = text.strip().splitlines()[0] if text.strip() else ""
        found = "yes" if task.solved_by(text) else "no"
        print(
            f"{name:10} {answer[:12]:12} {found:5} "
            f"{rate_text(stats.prefill_tokens_per_second):>6} t/s "
            f"{rate_text(stats.decode_tokens_per_second):>6} t/s "
            f"{share_text(stats.decode_blocks):>15} {stats.compile_seconds:6.1f} s",
            flush=True,
        )
    if arguments.forecast == "from_query":
        print(
            "\nsparda uses training-free Forecast heads (from_query): the mean of the "
            "next layer's\nquery heads in each group."
        )
