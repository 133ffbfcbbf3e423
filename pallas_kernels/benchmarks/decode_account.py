"""What bounds decode attention: its kernel and its merge, by the length of the lists.

Durations of single kernels in a profile, for lists of several lengths: a straight line
through them has the rate at which keys are read as its slope, and what a call costs
whatever it reads as its value at no bytes. Each line of settings is Triton's
``Config``: splits, warps, stages. Both merges are timed: Triton's and XLA's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels._common.cache import write_json
from pallas_kernels._common.command import Parser
from pallas_kernels._common.devices import current_platform
from pallas_kernels._common.splits import merge_splits
from pallas_kernels._common.triton_merge import merge_splits_triton
from pallas_kernels.benchmarks.harness import copy_bandwidth, device_kernels
from pallas_kernels.benchmarks.paged_decode_attention import inputs
from pallas_kernels.paged_decode_attention import pallas_triton as triton
from pallas_kernels.paged_decode_attention.operands import checked

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 2, 128, 64
LISTED = (24, 48, 96, 192)


def straight_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at zero and slope of the least-squares line through points (x, y)."""
    xs, ys = zip(*points, strict=True)
    slope, value = statistics.linear_regression(xs, ys)
    return value, slope


def _settings(text: str) -> triton.Config:
    """ "8,4,3" as splits, warps and stages."""
    try:
        return triton.Config(*(int(word) for word in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be splits,warps,stages, as in "
            f"8,4,3 ({error})"
        ) from error


def attention_microseconds(config: triton.Config, batch: int, listed: int) -> float:
    """Duration of one attention kernel; merging is left out."""
    size = batch * KV_HEADS * listed * BLOCK * 2 * HEAD_DIM * 2
    layers = min(24, max(4, int(4e8 // size)))
    sizes = (layers, batch, HEADS, KV_HEADS, HEAD_DIM, BLOCK, max(LISTED), listed)
    operands = inputs(*sizes, jnp.bfloat16)

    def chain(q, kv, slots, lengths):
        for layer in range(layers):
            decode = checked(q, kv, slots=slots, slot_lengths=lengths, layer=layer)
            q, _ = triton.paged_decode_attention_triton(decode, config=config)
        return q

    found = device_kernels(chain, *operands)
    return _of_kernels(found, "paged_decode_attention", layers)


def merge_microseconds(form: str, config: triton.Config, batch: int) -> float:
    """Durations of all kernels that merge the parts of one call."""
    links, pairs, groups = 8, batch * KV_HEADS, HEADS // KV_HEADS
    keys = jax.random.split(jax.random.key(0))
    shape = (links, pairs, config.splits, groups)
    out = jax.random.normal(keys[0], (*shape, HEAD_DIM))
    lse = jax.random.normal(keys[1], shape)

    def chain(out, lse):
        results = []
        for link in range(links):
            if form == "xla":
                merged, total = merge_splits(out[link], lse[link])
                results.append((merged.astype(jnp.bfloat16), total))
            else:
                results.append(merge_splits_triton(out[link], lse[link], jnp.bfloat16))
        return results

    # XLA's slices of the operands in front of a Triton kernel are no part of it.
    part = "" if form == "xla" else "merge_splits"
    return _of_kernels(device_kernels(chain, out, lse), part, links)


def _of_kernels(found: dict[str, tuple[int, float]], name: str, links: int) -> float:
    """Microseconds a link that kernels with ``name`` in theirs take."""
    seconds = sum(total for kernel, (_, total) in found.items() if name in kernel)
    return 1e6 * seconds / links


def account(config: triton.Config, batch: int, bandwidth: float) -> dict[str, object]:
    """Figures of one line of settings, printed too."""
    times = {
        listed: attention_microseconds(config, batch, listed)
        for listed in LISTED
        if listed >= config.splits
    }
    token = batch * KV_HEADS * BLOCK * 2 * HEAD_DIM * 2
    start, slope = straight_line([(listed * token, t) for listed, t in times.items()])
    merges = {
        form: merge_microseconds(form, config, batch) if config.splits > 1 else 0.0
        for form in ("triton", "xla")
    }
    whole = times[96] + merges["triton"]
    share = 96 * token / (whole * 1e-6) / bandwidth
    print(
        f"batch {batch:3} splits {config.splits:3} warps {config.num_warps} stages "
        f"{config.num_stages}: "
        + ", ".join(f"{listed}: {t:.2f}" for listed, t in times.items())
        + f" us; at no bytes {start:.2f} us, then {1e-3 / slope:.0f} GB/s; merge "
        f"{merges['triton']:.2f} us, XLA's {merges['xla']:.2f}; 96 blocks "
        f"{whole:.2f} us = {share:.0%} of copy",
        flush=True,
    )
    return {
        "batch": batch,
        "config": dataclasses.asdict(config),
        "attention_us": {str(listed): t for listed, t in times.items()},
        "start_us": start,
        "gigabytes_per_second": 1e-3 / slope,
        "merge_us": merges,
        "share_of_copy": share,
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--settings",
        type=_settings,
        nargs="+",
        default=[triton.Config(8, 4, 3)],
        help="splits,warps,stages",
    )
    parser.add_argument("--json", type=Path, help="also write figures here")
    args = parser.parse_args()
    if current_platform() != "cuda":
        sys.exit("durations of kernels are read from a GPU's profile; none is here")
    bandwidth = copy_bandwidth()
    rows = []
    figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    for batch in args.batch:
        for config in args.settings:
            try:
                rows.append(account(config, batch, bandwidth))
            except Exception as error:  # one line's failure must not lose the others
                print(f"{config} failed: {error}"[:300], flush=True)
                continue
            if args.json is not None:
                write_json(args.json, figures)


if __name__ == "__main__":
    main()
