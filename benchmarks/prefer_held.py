"""What it saves, and costs, to prefer blocks that the slots hold on near ties.

    python -m benchmarks.prefer_held --model smollm2-135m --context 4096
    python -m benchmarks.prefer_held --model qwen.gguf --context 30720 --slots 1 2 4

A block that is on the device costs no fetch. So of the blocks that a Forecast places
around the end of its list, from (1 - margin) to (1 + margin) of what scores choose,
those that slots hold are taken first, the last used ones before others. Printed are, by
slots in budgets: the share of a list that must be fetched, and the recall of the blocks
that own queries choose. Margin 0 is the Forecast's own list. The choice then depends on
what came before, which nothing in this library's caches may: this only measures it.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from benchmarks.parsers import add_document_options, benchmark_parser
from benchmarks.trace import text_ids
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_option

if TYPE_CHECKING:
    import sparda_jax as sj

# Steps that do not count: slots begin empty.
_WARM = 64


class Lists(NamedTuple):
    """Blocks that a Forecast places first, by how many are taken, at every step.

    Attributes:
      sure: Those before the margin.
      listed: Those of the budget.
      wide: Those up to the margin's end.
    """

    sure: Bool[np.ndarray, "streams T M"]
    listed: Bool[np.ndarray, "streams T M"]
    wide: Bool[np.ndarray, "streams T M"]


def prefer_held(
    lists: Lists, own: Int[np.ndarray, " T"], slots: int
) -> tuple[Bool[np.ndarray, "streams T M"], Int[np.ndarray, "streams T"]]:
    """Replays steps through least recently used slots, and lets them choose on ties.

    Args:
      lists: Of the Forecast.
      own: The block that each step's token is in, which is never fetched.
      slots: Of a kv head.

    Returns:
      What is listed then, as many blocks as before, and the blocks fetched.
    """
    streams, steps, blocks = lists.listed.shape
    last_used = np.full((streams, blocks), -1)
    chosen = np.zeros_like(lists.listed)
    fetched = np.zeros((streams, steps), np.int64)
    places = np.arange(blocks)[None]
    for step in range(steps):
        recent = np.empty_like(last_used)
        order = np.argsort(-last_used, axis=1, kind="stable")
        np.put_along_axis(recent, order, places, axis=1)
        held = (recent < slots) & (last_used >= 0)
        sure, listed, wide = (x[:, step] for x in lists)
        worth = np.where(listed, 0, -1)
        worth = np.where(wide & held, 1 + last_used, worth)
        worth = np.where(sure, steps + 1, worth)
        best = np.argsort(-worth, axis=1, kind="stable")
        place = np.empty_like(best)
        np.put_along_axis(place, best, places, axis=1)
        taken = place < listed.sum(1, keepdims=True)
        chosen[:, step] = taken
        new = taken & ~held
        new[:, own[step]] = False
        fetched[:, step] = new.sum(1)
        last_used[taken] = step
    return chosen, fetched


def _walk(lm: "sj.LanguageModel", ids: list[int], budget: int) -> np.ndarray:
    """Lists of Forecast and own query at a budget, [2, layers · kv heads, steps, M]."""
    from sparda_jax.evaluation.forecast_measure import make_plan, walk_layers

    plan = make_plan(lm, len(ids))
    plan = dataclasses.replace(plan, budget=budget, budgets=(budget,))
    layers = [np.asarray(x.listed) for x in walk_layers(lm, ids, plan)]
    # Layer 0 is resident: what it chooses is never fetched.
    return np.concatenate(layers[1:], axis=1)


def measure(
    lists: Lists,
    wanted: Bool[np.ndarray, "streams T M"],
    own: Int[np.ndarray, " T"],
    slots: int,
    budget: int,
) -> dict[str, float]:
    """Share of a list that is fetched, and recall of what own queries choose.

    Args:
      lists: Of the Forecast.
      wanted: What own queries choose by score.
      own: The block that each step's token is in.
      slots: Of a kv head.
      budget: Blocks of a list.
    """
    chosen, fetched = prefer_held(lists, own, slots)
    asked = wanted[:, _WARM:]
    return {
        "fetched": float(fetched[:, _WARM:].mean()) / budget,
        "recall": float((asked & chosen[:, _WARM:]).sum() / asked.sum()),
    }


def _run(arguments: argparse.Namespace) -> None:
    import jax

    import sparda_jax as sj

    lm = sj.load(arguments.model, attention="sparda")
    arguments.decode = 2 * _WARM
    ids, sparse = text_ids(lm, arguments), lm.sparse
    budget = sparse.largest_budget
    scored = budget - sparse.forced_blocks
    listed, by_own = _walk(lm, ids, budget)
    own = (len(ids) - listed.shape[1] + np.arange(listed.shape[1])) // sparse.block_size
    block = np.arange(listed.shape[2])
    wanted = by_own & (block >= sparse.init_blocks)
    wanted &= block < own[:, None] - sparse.local_blocks
    figures: dict[str, Any] = {
        "model": lm.config.name,
        "text": pathlib.Path(arguments.text).name,
        "context": len(ids),
        "steps": int(listed.shape[1]) - _WARM,
        "budget": budget,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "margins": {},
    }
    names = "".join(f"{f'C = {size:g}x':>18}" for size in arguments.slots)
    print(
        f"{figures['model']}, {figures['text']}, {len(ids)} tokens, the last "
        f"{figures['steps']} counted, {figures['device']}, JAX {jax.__version__}; "
        "fetched in % of a list, recall in %"
    )
    print(f"{'margin':10}{names}", flush=True)
    for margin in (0.0, *arguments.margin):
        lists = Lists(listed, listed, listed)
        if margin:
            spare = round(scored * margin)
            around = [_walk(lm, ids, budget + x)[0] for x in (-spare, spare)]
            lists = Lists(around[0], listed, around[1])
        row = {
            f"{size:g}": measure(lists, wanted, own, round(size * budget), budget)
            for size in arguments.slots
        }
        figures["margins"][f"{margin:g}"] = row
        cells = "".join(
            f"{cell['fetched']:10.1%} {cell['recall']:7.1%}" for cell in row.values()
        )
        print(f"{margin:<10g}{cells}", flush=True)
        if arguments.json is not None:
            write_json(arguments.json, figures)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("prefer_held", __doc__)
    add_document_options(parser)
    margin = {"metavar": "SHARE", "default": [0.1, 0.25], "help": "of the list"}
    add_option(parser, "--margin", number(above=0, most=1), many=True, **margin)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures every margin."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
