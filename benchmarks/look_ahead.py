"""What else could be prefetched than a Forecast's list, from recorded block lists.

    python -m benchmarks.look_ahead smollm2-135m_4k_code_infllm_v2.npz \\
        --forecast smollm2-135m_4k_code_sparda.npz

Both are in benchmarks/traces. The first one holds what a layer's own queries choose: it
is what must be there. The second one holds what the Forecast chose for the same tokens
of the same text. Compared are lists that can be prefetched before a layer begins:

  forecast       the Forecast's, made one layer before
  reuse          the list of the layer before
  reuse-2        the list of two layers before
  last-token     the layer's own list of the token before
  none           nothing: what is missing is fetched when the layer needs it

For each: the share of the scored blocks that were prefetched (recall), and what a cache
of C slots with least-recently-used reuse fetches a token and head: blocks ahead, beside
compute, and blocks that the layer's own queries still miss and must wait for.
This is the traffic of `exactness="verify"`. The Forecast's run attends to its own
lists, so that its hidden states, and with them its lists, differ a little from those of
a run that would be verified.
"""

import argparse
import pathlib
import sys

import numpy as np
from jaxtyping import Bool

from benchmarks.parsers import benchmark_parser
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checks import ConfigError
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option
from sparda_jax.planning.traces import WARM_STEPS, BlockTrace, read_trace, slot_misses

SIZES = (1.0, 2.0, 4.0)
# What makes two traces lists of the same tokens.
_SAME = ("model", "text", "tokens", "prefill", "block_size", "block_budget")
_SAME += ("init_blocks", "local_blocks")


def prefetched_lists(
    own: BlockTrace, forecast: BlockTrace | None
) -> dict[str, Bool[np.ndarray, "L K T M"]]:
    """What each way prefetches for each layer, by its name; none for layers without it.

    Args:
      own: What the layers' own queries choose.
      forecast: What the Forecast chose; None leaves it out.

    Raises:
      ConfigError: If the two are not lists of the same tokens.
    """
    listed = own.listed
    nothing = np.zeros_like(listed)
    found = {}
    if forecast is not None:
        for name in _SAME:
            if getattr(own, name) != getattr(forecast, name):
                raise ConfigError(
                    f"forecast={getattr(forecast, name)!r} is not allowed as {name} of "
                    f"the Forecast's trace: it must be {getattr(own, name)!r}, as in "
                    "the trace of own queries"
                )
        if forecast.listed.shape != listed.shape:
            raise ConfigError(
                f"forecast={forecast.listed.shape} is not allowed as the shape of the "
                f"Forecast's lists: it must be {listed.shape}"
            )
        # Nobody looks ahead for layer 0.
        found["forecast"] = np.concatenate((nothing[:1], forecast.listed[1:]))
    for name, back in (("reuse", 1), ("reuse-2", 2)):
        found[name] = np.concatenate((nothing[:back], listed[:-back]))
    found["last-token"] = np.concatenate((nothing[:, :, :1], listed[:, :, :-1]), axis=2)
    found["none"] = nothing
    return found


def figures(
    own: BlockTrace, prefetched: Bool[np.ndarray, "L K T M"], first: int
) -> dict:
    """Recall and traffic of what is prefetched, over the layers from `first` on.

    Args:
      own: What the layers' own queries choose.
      prefetched: What is fetched before a layer begins.
      first: The first layer that counts.
    """
    count, blocks = own.listed.shape[2:]
    begin = own.prefill + min(WARM_STEPS, own.decode // 4)
    chosen = own.chosen[first:, :, begin:]
    recall = (chosen & prefetched[first:, :, begin:]).sum() / chosen.sum()
    forced = own.block_budget - own.scored
    slots = [forced + round(size * own.scored) for size in SIZES]
    # A token's two lists one after the other: what is prefetched, then what is needed.
    both = np.stack((prefetched[first:], own.listed[first:]), axis=3)
    both = both.reshape(-1, 2 * count, blocks)
    misses = slot_misses(both, np.repeat(own.own_blocks, 2), slots)
    misses = misses.reshape(-1, count, 2, len(slots))[:, begin:].mean((0, 1))
    return {
        "recall": float(recall),
        "traffic": {
            f"{size:g}": {
                "ahead": float(misses[0, i] / own.scored),
                "waited_for": float(misses[1, i] / own.scored),
            }
            for i, size in enumerate(SIZES)
        },
    }


def _run(arguments: argparse.Namespace) -> None:
    own = read_trace(arguments.own)
    forecast = None
    if arguments.forecast is not None:
        forecast = read_trace(arguments.forecast)
    first = 2  # the first layer that all of them prefetch something for
    if own.listed.shape[0] <= first:
        raise ConfigError(
            f"own={str(arguments.own)!r} is not allowed: it must have more than "
            f"{first} layers"
        )
    found = {
        name: figures(own, lists, first)
        for name, lists in prefetched_lists(own, forecast).items()
    }
    print(
        f"{own.model}, {own.text}, {own.length} tokens, {own.scored} scored blocks of "
        f"{own.block_budget}, layers {first} to {own.listed.shape[0] - 1}; fetched, in "
        "% of the scored blocks: ahead + waited for"
    )
    names = "".join(f"{f'C = {size:g}x':>16}" for size in SIZES)
    print(f"{'prefetched':12}{'recall':>8}{names}")
    for name, row in found.items():
        cells = "".join(
            f"{cell['ahead']:9.1%} +{cell['waited_for']:5.1%}"
            for cell in row["traffic"].values()
        )
        print(f"{name:12}{row['recall']:8.1%}{cells}")
    if arguments.json is not None:
        keys = ("model", "text", "length", "scored", "block_budget")
        write_json(
            arguments.json,
            {key: getattr(own, key) for key in keys} | {"prefetched": found},
        )


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("look_ahead", __doc__)
    parser.add_argument("own", type=pathlib.Path, help="trace of own queries")
    add_file_option(parser)
    parser.add_argument("--forecast", type=pathlib.Path, help="trace of the Forecast")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compares what can be prefetched."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
