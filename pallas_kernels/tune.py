"""Finds settings on the device at hand: ``python -m pallas_kernels.tune <op>``.

For every case and implementation, each candidate is compiled, its result compared with
the XLA form, and timed. With ``--write`` the record goes to
``tuned/<device>/<op>.json``: the fastest settings by case, and the implementations that
were right and faster than XLA as the default order.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common.dispatch import TUNED, current_device_kind, device_slug
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.benchmarks import block_sparse_attention as prefill
from pallas_kernels.benchmarks import paged_decode_attention as decode
from pallas_kernels.benchmarks.harness import measure


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem to tune.

    Attributes:
      when: sizes written to the record; the entry serves calls that match them.
      operands: arrays for ``run``.
      run: takes an implementation's name, a config or None, and the operands.
      configs: candidates by implementation.
      links: operations chained in one call of ``run``.
    """

    when: dict[str, int]
    operands: tuple[Any, ...]
    run: Callable[..., Any]
    configs: dict[str, Sequence[Any]]
    links: int = 1


def decode_cases(small: bool) -> Iterator[Case]:
    """Batches of the 8B shape with 96 blocks."""
    from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu as mosaic
    from pallas_kernels.paged_decode_attention import pallas_triton as triton
    from pallas_kernels.paged_decode_attention.xla import paged_decode_attention_xla

    functions = {
        "mosaic_gpu": mosaic.paged_decode_attention_mosaic_gpu,
        "triton": triton.paged_decode_attention_triton,
    }
    for batch in (1,) if small else (1, 8, 16, 64):
        heads, kv_heads, head_dim, block, listed = 32, 2, 128, 64, 4 if small else 96
        layers = 2 if small else 6
        q, kv, slots, lengths = decode.inputs(
            layers,
            batch,
            heads,
            kv_heads,
            head_dim,
            block,
            2 * listed,
            listed,
            jnp.bfloat16,
        )

        def run(name, config, q, kv, slots, lengths, layers=layers):
            f = functools.partial(paged_decode_attention_xla)
            if name != "xla":
                f = functools.partial(functions[name], config=config)
            lse = None
            for layer in range(layers):
                args = (q, kv, slots, lengths, None, jnp.int32(layer), None)
                q, lse = f(*args, scale=q.shape[-1] ** -0.5)
            return q, lse

        pairs = batch * kv_heads
        splits = sorted({min(listed, max(1, n // pairs)) for n in (132, 264, 528)})
        warps_stages = ((2, 3), (4, 3), (4, 4))
        yield Case(
            {"B": batch, "K": kv_heads, "P": listed, "H": head_dim},
            (q, kv, slots, lengths),
            run,
            {
                "triton": [
                    triton.Config(s, *ws)
                    for s, ws in itertools.product(splits, warps_stages)
                ],
                "mosaic_gpu": [
                    mosaic.Config(s, stages)
                    for s, stages in itertools.product(splits, (2, 4))
                ],
            },
            links=layers,
        )


def prefill_cases(small: bool) -> Iterator[Case]:
    """The 8B shape with 96 blocks at 16k tokens."""
    from pallas_kernels.block_sparse_attention import pallas_mosaic_gpu as mosaic
    from pallas_kernels.block_sparse_attention import pallas_triton as triton
    from pallas_kernels.block_sparse_attention.xla import block_sparse_attention_xla

    functions = {
        "mosaic_gpu": mosaic.block_sparse_attention_mosaic_gpu,
        "triton": triton.block_sparse_attention_triton,
    }
    tokens, listed = (512, 4) if small else (16384, 96)
    keys = jax.random.split(jax.random.key(1))
    q = jax.random.normal(keys[0], (1, tokens, 32, 128), jnp.bfloat16)
    shape = (1, 1, 2, tokens // 64, 64, 2, 128)
    kv = jax.random.normal(keys[1], shape, jnp.bfloat16)
    lists = prefill.selector_lists(tokens, 2, listed, 64, local=33, drift=64)

    def run(name, config, q, kv, start, lists):
        f = functools.partial(block_sparse_attention_xla)
        if name != "xla":
            f = functools.partial(functions[name], config=config)
        return f(q, kv, start, lists, jnp.int32(0), None, scale=128**-0.5)

    yield Case(
        {"G": 16, "H": 128, "P": listed},
        (q, kv, jnp.zeros((1,), jnp.int32), lists),
        run,
        {
            "triton": [
                triton.Config(*c)
                for c in ((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (128, 4, 2))
            ],
            "mosaic_gpu": [
                mosaic.Config(*c)
                for c in ((128, 2, True), (128, 2, False), (64, 4, True), (64, 5, True))
            ],
        },
    )


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "paged_decode_attention": decode_cases,
    "block_sparse_attention": prefill_cases,
}


def tune(op: str, small: bool = False) -> dict[str, Any]:
    """Tunes one operation and returns its record.

    Args:
      op: one of ``CASES``.
      small: tiny sizes, to try the tuner itself.

    Returns:
      What ``--write`` puts into the JSON file.
    """
    configs: dict[str, list[Any]] = {}
    numerics: dict[str, float] = {}
    faster: dict[str, bool] = {}
    for case in CASES[op](small):
        baseline = functools.partial(case.run, "xla", None)
        want = jax.jit(baseline)(*case.operands)
        limit = measure(f"{case.when} xla", baseline, *case.operands, links=case.links)
        for name, candidates in case.configs.items():
            best = None
            for config in candidates:
                f = functools.partial(case.run, name, config)
                title = f"{case.when} {name} {config}"
                timing = measure(title, f, *case.operands, links=case.links)
                if timing.seconds is None:
                    continue
                got = jax.jit(f)(*case.operands)
                error = max(
                    relative_error(x, y)
                    for x, y in zip(
                        jax.tree.leaves(got), jax.tree.leaves(want), strict=True
                    )
                )
                # A chain of layers adds up the rounding of each of them.
                allowed = 2 * tolerance(case.operands[0].dtype)
                if error > allowed:
                    print(f"  wrong: relative error {error:.1e}")
                    continue
                numerics[name] = max(numerics.get(name, 0.0), error)
                if best is None or timing.seconds < best[0]:
                    best = (timing.seconds, config, timing.spread)
            if best is None:
                faster[name] = False
                continue
            wins = limit.seconds is None or best[0] < limit.seconds
            faster[name] = faster.get(name, True) and wins
            configs.setdefault(name, []).append(
                {
                    "when": case.when,
                    "config": dataclasses.asdict(best[1]),
                    "milliseconds": round(best[0] * 1e3, 5),
                    "spread": round(best[2] or 0.0, 3),
                    "xla_milliseconds": limit.seconds and round(limit.seconds * 1e3, 5),
                }
            )
    total = {
        name: sum(entry["milliseconds"] for entry in entries)
        for name, entries in configs.items()
    }
    order = sorted((n for n, wins in faster.items() if wins), key=lambda n: total[n])
    return {
        "device": current_device_kind(),
        "jax": jax.__version__,
        "default": [*order, "xla"],
        "relative_error_against_xla": numerics,
        "configs": configs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tuner from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=sorted(CASES))
    parser.add_argument("--small", action="store_true", help="try the tuner itself")
    parser.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--out", type=Path, help="write it to this folder instead")
    args = parser.parse_args(argv)
    text = json.dumps(tune(args.op, args.small), indent=1) + "\n"
    sys.stdout.write(text)
    folder = args.out or (TUNED / device_slug(current_device_kind()))
    if args.write or args.out:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.op}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
