"""Records which blocks a real model chooses over a real document, and shows traces.

    python -m benchmarks.trace record --model smollm2-135m --text prose \\
        --attention infllm_v2 --context 4096 --out prose.npz
    python -m benchmarks.trace show benchmarks/traces/*.npz
    python -m benchmarks.trace curves --out sparda_jax/planning/misses.json \
        benchmarks/traces/smollm2-135m_4k_prose_*.npz

A prompt is prefilled, and the document's next tokens are then decoded one by one, so
that neither sampling nor a model that repeats itself decides what is chosen. Kept are
the lists of the prompt's last `--prefill` tokens and of all decode steps, of every
layer and kv head (`sparda_jax.planning.traces` has the format).

Texts: `prose` is Python's own manual, `code` the standard library's `_pydecimal.py`;
anything else is a text file. `show` prints what the lists are like: the share of the
scored blocks that is new at a step, the share that a cache of C slots misses, by slots
per scored block, and how many blocks neighbouring tokens list together, in lists.
`curves` writes what the planner takes of them, a curve an attention.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
import sysconfig
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.fed_text import feed_text
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checkpoint.files import read_text
from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import Parser, add_file_option
from sparda_jax.config import CacheConfig
from sparda_jax.planning.misses import curve_of
from sparda_jax.planning.traces import BlockTrace, read_trace, write_trace

if TYPE_CHECKING:
    import sparda_jax as sj

SIZES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NEIGHBOURS = (16, 64, 128)


def read_document(name: str) -> str:
    """A document: "prose", "code" or a text file.

    Raises:
      ConfigError: If there is no such file.
      CheckpointError: If it cannot be read.
    """
    from sparda_jax.evaluation.texts import python_manual

    if name == "prose":
        return python_manual()
    path = pathlib.Path(name)
    if name == "code":
        path = pathlib.Path(sysconfig.get_path("stdlib")) / "_pydecimal.py"
    found = read_text(path)
    if found is None:
        raise ConfigError(
            f"--text={name!r} is not allowed: 'prose', 'code' or a text file"
        )
    return found


def text_ids(lm: "sj.LanguageModel", arguments: argparse.Namespace) -> list[int]:
    """The beginning of `--text`, `--context` tokens of it.

    Raises:
      ConfigError: If it is shorter, or all that is decoded fits the budget.
    """
    if lm.tokenizer is None:
        raise ConfigError(f"--model={arguments.model!r}: {lm.no_tokenizer}")
    document = read_document(arguments.text)[: 8 * arguments.context]
    ids = list(lm.tokenizer.encode(document))[: arguments.context]
    least = lm.sparse.largest_budget * lm.sparse.block_size + arguments.decode
    if len(ids) < arguments.context or len(ids) <= least:
        raise ConfigError(
            f"--context={arguments.context} is not allowed: --text={arguments.text} "
            f"gives {len(ids)} tokens, and more than {least} are needed"
        )
    return ids


def record(
    lm: "sj.LanguageModel",
    ids: list[int],
    *,
    text: str,
    forecast: str,
    prefill: int,
    decode: int,
) -> BlockTrace:
    """Runs a model over a document and keeps what it chose.

    Args:
      lm: The model, with the attention whose choice is to be kept.
      ids: The document; all but the last `decode` tokens are the prompt.
      text: The document's name.
      forecast: Where the Forecast heads come from, for the record.
      prefill: Tokens of the prompt's end whose lists are kept.
      decode: Tokens to decode.
    """
    import jax

    prompt = len(ids) - decode
    before, steps = feed_text(
        *(lm, ids, decode, CacheConfig()),
        of_prompt=lambda _, carry: carry.blocks[:, 0, :, prompt - prefill : prompt],
        of_step=lambda _, carry: carry.blocks[:, 0, :, 0],
    )
    sparse = lm.sparse
    lists = np.concatenate([before, np.moveaxis(np.asarray(steps), 0, 2)], axis=2)
    blocks = (len(ids) - 1) // sparse.block_size + 1
    listed = np.zeros((*lists.shape[:3], blocks + 1), bool)
    np.put_along_axis(listed, np.where(lists < 0, blocks, lists), True, axis=-1)
    return BlockTrace(
        model=lm.config.name,
        text=text,
        attention=lm.selector.name,
        forecast=forecast if lm.selector.needs_forecast else "",
        tokens=prompt - prefill,
        prefill=prefill,
        block_size=sparse.block_size,
        init_blocks=sparse.init_blocks,
        local_blocks=sparse.local_blocks,
        block_budget=sparse.largest_budget,
        listed=listed[..., :blocks],
        notes={
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": str(lm.model.embedding[...].dtype),
            "kernel_size": sparse.kernel_size,
            "kernel_stride": sparse.kernel_stride,
        },
    )


def unions(lists: np.ndarray, neighbours: int) -> float:
    """Blocks that neighbouring tokens list together, over those of one list.

    Args:
      lists: Whether a token lists a block, [..., T, M].
      neighbours: Tokens of a group.
    """
    count = lists.shape[-2] // neighbours
    if not count:
        return math.nan
    groups = lists[..., : count * neighbours, :]
    groups = groups.reshape(*lists.shape[:-2], count, neighbours, -1)
    size = lists.sum(-1).mean()
    return float(groups.any(-2).sum(-1).mean() / size)


def figures(trace: BlockTrace) -> dict:
    """What the lists of a trace are like."""
    layers, heads, count, blocks = trace.listed.shape
    curve = trace.miss_curve(SIZES)
    share = trace.scored / trace.block_budget
    return {
        "model": trace.model,
        "text": trace.text,
        "attention": trace.attention,
        "forecast": trace.forecast,
        "layers": layers,
        "kv_heads": heads,
        "context": trace.tokens + count,
        "prefill": trace.prefill,
        "decode": trace.decode,
        "blocks": blocks,
        "budget": trace.block_budget,
        "scored": trace.scored,
        "new_share_of_scored": round(trace.new_share, 4),
        "new_share_of_list": round(trace.new_share * share, 4),
        "miss_of_scored": {
            f"{size:g}": round(float(miss), 4)
            for size, miss in zip(SIZES, curve, strict=True)
        },
        "union_in_lists": {
            str(n): round(unions(trace.listed[:, :, : trace.prefill], n), 3)
            for n in NEIGHBOURS
        },
        **trace.notes,
    }


def _show(arguments: argparse.Namespace) -> None:
    found = {str(path): figures(read_trace(path)) for path in arguments.traces}
    for path, values in found.items():
        misses = ", ".join(
            f"{size}: {miss:.1%}" for size, miss in values["miss_of_scored"].items()
        )
        groups = ", ".join(f"{n}: {u}" for n, u in values["union_in_lists"].items())
        print(
            f"{path}\n"
            f"  {values['model']}, {values['text']}, {values['attention']} "
            f"{values['forecast']}, {values['layers']} layers, {values['kv_heads']} kv "
            f"heads, {values['context']} tokens, {values['scored']} of "
            f"{values['budget']} blocks scored; {values['prefill']} lists of prefill, "
            f"{values['decode']} of decode\n"
            f"  new at a step: {values['new_share_of_scored']:.1%} of the scored "
            f"blocks, {values['new_share_of_list']:.1%} of the list\n"
            f"  missed of the scored blocks, by slots per scored block: {misses}\n"
            f"  union of neighbours, in lists: {groups}"
        )
    if arguments.json:
        write_json(arguments.json, found)


def _curves(arguments: argparse.Namespace) -> None:
    traces = [read_trace(path) for path in arguments.traces]
    found = {trace.attention: curve_of(trace) for trace in traces}
    if len(found) < len(traces) or "infllm_v2" not in found:
        raise ConfigError(
            f"traces={sorted(trace.attention for trace in traces)} are not allowed: "
            "one of each attention, and infllm_v2 among them"
        )
    write_json(
        arguments.out, {name: dataclasses.asdict(x) for name, x in found.items()}
    )


def _record(arguments: argparse.Namespace) -> None:
    import sparda_jax as sj

    for name in ("context", "prefill", "decode"):
        integer(1)(f"--{name}", getattr(arguments, name))
    forecast = arguments.forecast
    lm = sj.load(
        arguments.model,
        attention=arguments.attention,
        **({} if forecast is None else {"forecast": forecast}),
    )
    if lm.tokenizer is None:
        raise ConfigError(f"--model={arguments.model!r}: {lm.no_tokenizer}")
    # More characters than any text has for a token: encoding all of it takes long.
    document = read_document(arguments.text)[: 8 * arguments.context]
    ids = list(lm.tokenizer.encode(document))[: arguments.context]
    least = lm.sparse.largest_budget * lm.sparse.block_size
    need = least + arguments.prefill + arguments.decode
    if len(ids) < arguments.context or len(ids) < need:
        raise ConfigError(
            f"--context={arguments.context} is not allowed: --text={arguments.text} "
            f"gives {len(ids)} tokens, and {need} are the least, so that every token "
            "has more blocks than its budget"
        )
    trace = record(
        lm,
        ids,
        text=pathlib.Path(arguments.text).name,
        forecast=pathlib.Path(forecast or "its own").name,
        prefill=arguments.prefill,
        decode=arguments.decode,
    )
    if arguments.name:
        trace = dataclasses.replace(trace, model=arguments.name)
    write_trace(arguments.out, trace)
    _show(argparse.Namespace(traces=[arguments.out], json=None))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m benchmarks.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("record", help="run a model and write its trace")
    new.add_argument("--model", default="smollm2-135m", help="as `sparda_jax.load`")
    new.add_argument("--name", help="what to call it, where a file has another name")
    new.add_argument("--text", default="prose", help="prose, code or a text file")
    new.add_argument("--attention", default="infllm_v2", help="what chooses")
    new.add_argument("--forecast", help="Forecast heads: a file, or from_query")
    new.add_argument("--context", type=int, default=4096, help="tokens in all")
    new.add_argument("--prefill", type=int, default=192, help="lists of prefill kept")
    new.add_argument("--decode", type=int, default=256, help="tokens decoded")
    add_file_option(new, "--out", help="the trace", required=True)
    new.set_defaults(run=_record)
    show = commands.add_parser("show", help="what the lists of traces are like")
    show.add_argument("traces", type=pathlib.Path, nargs="+")
    add_file_option(show)
    show.set_defaults(run=_show)
    curves = commands.add_parser("curves", help="write the planner's curves")
    curves.add_argument("traces", type=pathlib.Path, nargs="+")
    add_file_option(curves, "--out", help="the curves", required=True)
    curves.set_defaults(run=_curves)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""

    def action() -> None:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
