"""Finds settings on the device at hand: ``python -m pallas_kernels.tune <op>``.

For every case and implementation, each candidate is compiled, its result compared with
the XLA form, and timed. With ``--write`` the record goes to
``tuned/<device>/<op>.json``: the fastest settings by case, and the implementations that
were right and faster than XLA as the default order.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
    for batch in (1,) if small else (8, 16, 64, 1):
        heads, kv_heads, head_dim, block, listed = 32, 2, 128, 64, 4 if small else 96
        # What one call reads is many times the second-level cache.
        layers = 2 if small else max(6, 32 // batch)
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

        yield Case(
            {"B": batch, "K": kv_heads, "P": listed, "H": head_dim},
            (q, kv, slots, lengths),
            run,
            {
                "triton": list(_triton_decode_configs(batch * kv_heads, listed)),
                "mosaic_gpu": list(_mosaic_decode_configs(batch * kv_heads, listed)),
            },
            links=layers,
        )


def _triton_decode_configs(pairs: int, listed: int) -> Iterator[Any]:
    from pallas_kernels.paged_decode_attention.pallas_triton import Config

    splits = sorted({min(listed, max(1, n // pairs)) for n in (132, 264, 528)})
    for s in splits:
        yield Config(s, 4, 3)


def _mosaic_decode_configs(pairs: int, listed: int) -> Iterator[Any]:
    """Splits merged by XLA or in a cluster, with shallow and deep rings."""
    from pallas_kernels.paged_decode_attention.pallas_mosaic_gpu import Config

    for cluster, programs in itertools.product((1, 2, 4, 8), (132, 264)):
        clusters = min(programs // (pairs * cluster), listed // cluster)
        if cluster > 1 and clusters > 1:
            continue  # no cluster leaves XLA as much to merge
        for stages, warpgroups in ((2, 1), (6, 2)) if clusters else ():
            yield Config(clusters * cluster, stages, cluster, warpgroups)


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


def scores_cases(small: bool) -> Iterator[Case]:
    """Forecast and own queries of the 8B shape, scores and choice."""
    from pallas_kernels.block_scores import pallas_triton as triton
    from pallas_kernels.block_scores.api import select_blocks
    from pallas_kernels.block_scores.rule import Rule

    tokens, budget = (512, 4) if small else (16384, 96)
    blocks, windows = tokens // 64, (tokens - 32) // 16 + 1
    keys = jax.random.split(jax.random.key(2))
    compressed = jax.random.normal(keys[0], (1, 2, windows, 128), jnp.bfloat16)
    for heads in (2, 32):
        query = jax.random.normal(keys[1], (1, tokens, heads, 128), jnp.bfloat16)
        softmax = heads > 2

        def run(name, config, query, compressed, softmax=softmax):
            start = jnp.zeros((1,), jnp.int32)
            if name == "triton" and config is not None:
                scale = 128**-0.5 if softmax else 1.0
                rule = Rule(blocks, 64, 32, 16, 1, 33, softmax, True, scale)
                count = jnp.full((1,), windows, jnp.int32)
                lists, _ = triton.select_blocks_triton(
                    query,
                    compressed[None],
                    start,
                    count,
                    jnp.int32(0),
                    rule=rule,
                    budget=budget,
                    config=config,
                    lse=False,
                )
            else:
                lists = select_blocks(
                    query,
                    compressed,
                    q_start=start,
                    blocks=blocks,
                    budget=budget,
                    softmax=softmax,
                    implementation=name,
                )
            # Near ties fall either way: what is compared is how many blocks.
            return jnp.sum(jnp.asarray(lists) >= 0, -1)

        shapes = ((64, 64), (128, 64), (64, 128))
        yield Case(
            {"G": heads // 2, "H": 128},
            (query, compressed),
            run,
            {
                "triton": [
                    triton.Config(*shape, warps) for shape in shapes for warps in (4, 8)
                ],
                "mosaic_gpu": [None],
            },
        )


def compress_cases(small: bool) -> Iterator[Case]:
    """Keys of one long row and of many."""
    from pallas_kernels.compress_keys import pallas_mosaic_gpu as mosaic
    from pallas_kernels.compress_keys.api import compress_keys

    batch, length = (1, 512) if small else (16, 131072)
    shape = (batch, 2, length, 128)
    keys = jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)

    def run(name, config, keys):
        if config is None:
            return compress_keys(keys, implementation=name)
        return mosaic.compress_keys_mosaic_gpu(
            keys, kernel_size=32, kernel_stride=16, config=config
        )

    yield Case(
        {"H": 128, "kernel_size": 32},
        (keys,),
        run,
        {
            "mosaic_gpu": [mosaic.Config(stages) for stages in (2, 4, 8)],
            "triton": [None],
        },
    )


def gather_cases(small: bool) -> Iterator[Case]:
    """Blocks of 32 KiB out of pinned host memory."""
    from pallas_kernels.host_gather import pallas_mosaic_gpu as mosaic
    from pallas_kernels.host_gather import pallas_triton as triton
    from pallas_kernels.host_gather.api import host_gather

    rows, count = (64, 8) if small else (16384, 768)
    host = jax.device_put(
        jnp.ones((rows, 64, 2, 128), jnp.bfloat16),
        jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    )
    index = jax.random.permutation(jax.random.key(0), rows)[:count].astype(jnp.int32)
    functions = {
        "mosaic_gpu": mosaic.host_gather_mosaic_gpu,
        "triton": triton.host_gather_triton,
    }

    def run(name, config, host, index):
        if config is None:
            return host_gather(host, index, implementation=name)
        return functions[name](host, index, config=config)

    programs = (8, 16, 32, 64)
    yield Case(
        {},
        (host, index),
        run,
        {
            "mosaic_gpu": [mosaic.Config(n) for n in programs],
            "triton": [triton.Config(n) for n in programs],
        },
    )


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "block_scores": scores_cases,
    "block_sparse_attention": prefill_cases,
    "compress_keys": compress_cases,
    "host_gather": gather_cases,
    "paged_decode_attention": decode_cases,
}


def _compile_all(
    case: Case, name: str, candidates: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Compiles every candidate, several at a time; an error stands for its result."""

    def compiled(config):
        try:
            f = jax.jit(functools.partial(case.run, name, config))
            return f.lower(*case.operands).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return list(zip(candidates, pool.map(compiled, candidates), strict=True))


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
        baseline = jax.jit(functools.partial(case.run, "xla", None))
        baseline = baseline.lower(*case.operands).compile()
        want = baseline(*case.operands)
        limit = measure(f"{case.when} xla", baseline, *case.operands, links=case.links)
        for name, candidates in case.configs.items():
            best = None
            for config, compiled in _compile_all(case, name, candidates):
                title = f"{case.when} {name} {config}"
                if isinstance(compiled, Exception):
                    print(f"{title} failed: {compiled}"[:300], flush=True)
                    continue
                timing = measure(title, compiled, *case.operands, links=case.links)
                if timing.seconds is None:
                    continue
                got = compiled(*case.operands)
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
                    "config": {} if best[1] is None else dataclasses.asdict(best[1]),
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
