"""Finds settings on the device at hand: ``python -m pallas_kernels.tune <op>``.

For every case and implementation, each candidate is compiled, its result compared with
the XLA form, and timed. With ``--write`` the record goes to
``tuned/<device>/<op>.json``: the fastest settings by case, and the implementations that
were right and faster than XLA as the default order. It is written after each
implementation of a case, so that a run cut short leaves what it has found, and says
under ``unfinished`` what is missing. ``--implementation`` and ``--case`` take that up;
entries of other cases stay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common.devices import current_device_kind, device_slug
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.benchmarks import block_sparse_attention as prefill
from pallas_kernels.benchmarks import paged_decode_attention as decode
from pallas_kernels.benchmarks.harness import Timing, measure
from pallas_kernels.dispatch import IMPLEMENTATIONS, TUNED


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem to tune.

    Attributes:
      when: sizes written to the record; the entry serves calls that match them.
      operands: arrays for ``run``.
      run: takes an implementation's name, a config or None, and the operands.
      configs: candidates by implementation.
      links: operations chained in one call of ``run``.
      order: what ``dispatch`` can tell calls like this one by; where its fastest
        implementation is not that of all cases together, the record says so.
      check: as ``run``; what is compared with the XLA form, ``run`` itself if None.
    """

    when: dict[str, int]
    operands: tuple[Any, ...]
    run: Callable[..., Any]
    configs: dict[str, Sequence[Any]]
    links: int = 1
    order: dict[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[..., Any] | None = None


def decode_cases(small: bool) -> Iterator[Case]:
    """Batches of the 8B shape with 96 blocks."""
    from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu as mosaic
    from pallas_kernels.paged_decode_attention import pallas_triton as triton
    from pallas_kernels.paged_decode_attention.xla import paged_decode_attention_xla

    functions = {
        "mosaic_gpu": mosaic.paged_decode_attention_mosaic_gpu,
        "triton": triton.paged_decode_attention_triton,
    }
    for batch in (1,) if small else (8, 16, 64, 1, 4, 20, 32):
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
    from pallas_kernels.block_scores.api import block_scores, select_blocks
    from pallas_kernels.block_scores.rule import Rule

    tokens, budget = (512, 4) if small else (16384, 96)
    blocks, windows = tokens // 64, (tokens - 32) // 16 + 1
    keys = jax.random.split(jax.random.key(2))
    compressed = jax.random.normal(keys[0], (1, 2, windows, 128), jnp.bfloat16)
    compared = min(tokens, 1024)
    for heads in (2, 32):
        query = jax.random.normal(keys[1], (1, tokens, heads, 128), jnp.bfloat16)
        softmax = heads > 2
        rule = Rule(
            blocks, 64, 32, 16, 1, 33, softmax, True, 128**-0.5 if softmax else 1.0
        )
        counts = jnp.full((1,), windows, jnp.int32)

        def run(name, config, query, compressed, rule=rule, counts=counts):
            start = jnp.zeros((1,), jnp.int32)
            if name == "triton":
                args = (query, compressed[None], start, counts, jnp.int32(0))
                return triton.select_blocks_triton(
                    *args, rule=rule, budget=budget, config=config, lse=False
                )[0]
            return select_blocks(
                query,
                compressed,
                q_start=start,
                blocks=blocks,
                budget=budget,
                softmax=rule.softmax,
                implementation=name,
            )

        def check(name, config, query, compressed, rule=rule, counts=counts):
            """Scores of the last tokens: near ties make lists differ, not scores."""
            query = query[:, -compared:]
            start = jnp.full((1,), tokens - compared, jnp.int32)
            if name == "triton":
                args = (query, compressed[None], start, counts, jnp.int32(0))
                return triton.block_scores_triton(*args, rule=rule, config=config)
            return block_scores(
                query,
                compressed,
                q_start=start,
                blocks=blocks,
                softmax=rule.softmax,
                return_lse=True,
                implementation=name,
            )

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
            order={"softmax": softmax},
            check=check,
        )


def choose_cases(small: bool) -> Iterator[Case]:
    """Rows of a decode step of the 8B shape behind 32k and 128k tokens.

    A row also has blocks for its answer: never 512 alone, which XLA sorts faster.
    """
    from pallas_kernels.choose_blocks import pallas_triton as triton
    from pallas_kernels.choose_blocks.xla import choose_blocks_xla

    budget = 4 if small else 96
    for blocks in (16,) if small else (520, 1032, 2056):
        layers, rows = 2 if small else 16, 16
        scores = jax.random.normal(jax.random.key(0), (layers, rows, blocks))
        own = jnp.full((rows,), blocks - 1, jnp.int32)

        def run(name, config, scores, own):
            f = functools.partial(choose_blocks_xla, budget=budget)
            if name != "xla":
                f = functools.partial(
                    triton.choose_blocks_triton, budget=budget, config=config
                )
            return [f(row, own) for row in scores]

        def check(name, config, scores, own, run=run):
            """Lists have no particular order."""
            return [jnp.sort(row) for row in run(name, config, scores, own)]

        yield Case(
            {"M": blocks, "P": budget},
            (scores, own),
            run,
            {"triton": [triton.Config(warps) for warps in (2, 4, 8)]},
            links=layers,
            check=check,
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


def commit_cases(small: bool) -> Iterator[Case]:
    """Blocks of 32 KiB out of a staging area, a tenth of them to be committed."""
    from pallas_kernels.commit_blocks import pallas_triton as triton
    from pallas_kernels.commit_blocks.api import commit_blocks

    rows, links = (64, 2) if small else (3072, 8)
    slots = jnp.ones((rows, 64, 2, 128), jnp.bfloat16)
    staged = jnp.full_like(slots, 2)
    order = jax.random.permutation(jax.random.key(0), rows).astype(jnp.int32)
    chance = jax.random.uniform(jax.random.key(1), (rows,))
    indices = jnp.where(chance < 0.1, order, -1)

    def run(name, config, slots, staged, indices):
        def step(_, slots):
            if config is None:
                return commit_blocks(slots, staged, indices, implementation=name)
            return triton.commit_blocks_triton(slots, staged, indices, config=config)

        # A loop carries the slots, as decode does: they are updated in place.
        return jax.lax.fori_loop(0, links, step, slots)

    yield Case(
        {},
        (slots, staged, indices),
        run,
        {
            "triton": [
                triton.Config(programs, part * 1024)
                for programs in (132, 528)
                for part in (8, 16, 32)
            ]
        },
        links=links,
    )


def plan_cases(small: bool) -> Iterator[Case]:
    """Lists of a decode step of the 8B shape, a tenth of each missing."""
    from pallas_kernels.benchmarks.plan_slots import chain, inputs
    from pallas_kernels.plan_slots import pallas_triton as triton
    from pallas_kernels.plan_slots.xla import plan_slots_xla

    budget, layers = (4, 2) if small else (96, 16)
    for rows in (2,) if small else (16, 64):
        operands = inputs(layers, rows, budget, budget)

        def run(name, config, *operands):
            f = plan_slots_xla
            if name != "xla":
                f = functools.partial(triton.plan_slots_triton, config=config)
            return chain(f, *operands)

        yield Case(
            {"R": rows, "C": budget, "P": budget},
            operands,
            run,
            {"triton": [triton.Config(warps) for warps in (1, 2, 4)]},
            links=layers,
        )


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "block_scores": scores_cases,
    "block_sparse_attention": prefill_cases,
    "choose_blocks": choose_cases,
    "commit_blocks": commit_cases,
    "compress_keys": compress_cases,
    "host_gather": gather_cases,
    "paged_decode_attention": decode_cases,
    "plan_slots": plan_cases,
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


def default_order(
    configs: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Who was right and faster than XLA in every case tuned, the fastest first.

    Args:
      configs: entries by implementation, as in the record.
      failed: implementations without a right candidate, with the case's sizes.

    Returns:
      Names, "xla" last. Times are summed over the cases that all of them have.
    """
    out = {entry["implementation"] for entry in failed}
    times = {
        name: {str(e["when"]): e["milliseconds"] for e in entries}
        for name, entries in configs.items()
        if name not in out
        and all(
            e["xla_milliseconds"] is None or e["milliseconds"] < e["xla_milliseconds"]
            for e in entries
        )
    }
    shared = set.intersection(*map(set, times.values())) if times else set()
    total = {name: sum(found[w] for w in shared) for name, found in times.items()}
    return [*sorted(total, key=lambda name: total[name]), "xla"]


def case_orders(
    configs: Mapping[str, Sequence[Mapping[str, Any]]], default: Sequence[str]
) -> list[dict[str, Any]]:
    """Orders of the calls whose fastest implementations are not the default's.

    Args:
      configs: entries by implementation, as in the record.
      default: the order of all cases together.

    Returns:
      The record's ``orders``: the names of ``default``, the fastest first.
    """
    times: dict[str, dict[str, float]] = {}
    for name, entries in configs.items():
        for entry in entries:
            if entry.get("order"):
                of_call = times.setdefault(json.dumps(entry["order"]), {})
                of_call[name] = of_call.get(name, 0.0) + entry["milliseconds"]
    orders = []
    for when, found in times.items():
        *names, last = default
        # One without a time in these cases stays behind those that have one.
        names.sort(key=lambda name: found.get(name, float("inf")))
        if [*names, last] != list(default):
            orders.append({"when": json.loads(when), "default": [*names, last]})
    return orders


def _best(
    case: Case, name: str, want: Any, limit: Timing
) -> tuple[dict[str, Any] | None, float]:
    """The record's entry of the fastest candidate that is right, and its error."""
    best, worst = None, 0.0
    for config, compiled in _compile_all(case, name, case.configs[name]):
        title = f"{case.when} {name} {config}"
        if isinstance(compiled, Exception):
            print(f"{title} failed: {compiled}"[:300], flush=True)
            continue
        timing = measure(title, compiled, *case.operands, links=case.links)
        if timing.seconds is None:
            continue
        if case.check is None:
            got = compiled(*case.operands)
        else:
            got = jax.jit(functools.partial(case.check, name, config))(*case.operands)
        error = max(
            relative_error(x, y)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        )
        # A chain of layers adds up the rounding of each of them.
        if error > 2 * tolerance(case.operands[0].dtype):
            print(f"  wrong: relative error {error:.1e}", flush=True)
            continue
        worst = max(worst, error)
        if best is None or timing.seconds < best[0]:
            best = (timing.seconds, config, timing.spread)
    if best is None:
        return None, worst
    seconds, config, spread = best
    entry = {
        "when": case.when,
        "config": {} if config is None else dataclasses.asdict(config),
        "milliseconds": round(seconds * 1e3, 5),
        "spread": round(spread or 0.0, 3),
        "xla_milliseconds": limit.seconds and round(limit.seconds * 1e3, 5),
    }
    if case.order:
        entry["order"] = case.order
    return entry, worst


def tune(
    op: str,
    small: bool = False,
    *,
    implementations: Collection[str] = (),
    only: Sequence[Mapping[str, int]] = (),
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Tunes one operation and returns its record.

    Args:
      op: one of ``CASES``.
      small: tiny sizes, to try the tuner itself.
      implementations: those to tune; all if empty.
      only: sizes of the cases to tune, each a part of ``Case.when``; all if empty.
      on_progress: called with the record so far after each implementation of a case.

    Returns:
      What ``--write`` puts into the JSON file.

    Raises:
      ValueError: when there is nothing to tune.
    """
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:4.0f} s] {text}", flush=True)

    cases = [
        case
        for case in CASES[op](small)
        if not only or any(part.items() <= case.when.items() for part in only)
    ]
    todo = [
        {"implementation": name, "when": case.when}
        for case in cases
        for name in case.configs
        if not implementations or name in implementations
    ]
    if not todo:
        raise ValueError(
            f"only is {list(only)} and implementations {list(implementations)}; no "
            f"case of {op} is left"
        )
    configs: dict[str, list[dict[str, Any]]] = {}
    numerics: dict[str, float] = {}
    failed: list[dict[str, Any]] = []

    def record() -> dict[str, Any]:
        default = default_order(configs, failed)
        return {
            "device": current_device_kind(),
            "jax": jax.__version__,
            "default": default,
            "orders": case_orders(configs, default),
            "relative_error_against_xla": dict(numerics),
            "configs": {name: list(entries) for name, entries in configs.items()},
            "failed": list(failed),
            "unfinished": list(todo),
        }

    for number, case in enumerate(cases, 1):
        names = [x["implementation"] for x in todo if x["when"] == case.when]
        say(f"{op}, case {number} of {len(cases)}: {case.when}")
        baseline = jax.jit(functools.partial(case.run, "xla", None))
        baseline = baseline.lower(*case.operands).compile()
        limit = measure(f"{case.when} xla", baseline, *case.operands, links=case.links)
        if case.check is None:
            want = baseline(*case.operands)
        else:
            want = jax.jit(functools.partial(case.check, "xla", None))(*case.operands)
        for name in names:
            say(f"{name}: {len(case.configs[name])} candidates")
            entry, error = _best(case, name, want, limit)
            done = todo.pop(0)
            if entry is None:
                failed.append(done)
            else:
                configs.setdefault(name, []).append(entry)
                numerics[name] = max(numerics.get(name, 0.0), error)
            on_progress(record())
    say("done")
    return record()


def merged(
    old: Mapping[str, Any], new: Mapping[str, Any], partial: bool
) -> dict[str, Any]:
    """A record with another run's entries in it.

    Args:
      old: what the file holds; empty for a new one.
      new: the record of a run.
      partial: the run was about some of the cases, so that what ``old`` lacks it still
        lacks.

    Returns:
      ``old`` with the values of ``new``; settings for sizes that ``new`` did not tune
      stay. The default order follows from all entries, unless some are without XLA's
      time, as written by hand: then it is the old one if ``partial``, else the new one.
    """
    done = [
        {"implementation": name, "when": entry["when"]}
        for name, entries in new["configs"].items()
        for entry in entries
    ] + new["failed"]
    configs: dict[str, list[Any]] = {}
    for name in [*new["configs"], *old.get("configs", {})]:
        kept = [
            e
            for e in old.get("configs", {}).get(name, [])
            if {"implementation": name, "when": e["when"]} not in done
        ]
        configs[name] = [*new["configs"].get(name, []), *kept]
    failed = [x for x in old.get("failed", []) if x not in done] + new["failed"]
    unfinished = new["unfinished"]
    if partial:
        unfinished = [x for x in old.get("unfinished", []) if x not in done]
    standing = old if partial and old else new
    order, orders = standing["default"], standing.get("orders", [])
    if all("xla_milliseconds" in e for entries in configs.values() for e in entries):
        order = default_order(configs, failed)
        orders = case_orders(configs, order)
    key = "relative_error_against_xla"
    out = {
        **old,
        **new,
        "default": order,
        "orders": orders,
        key: {**old.get(key, {}), **new[key]},
        "configs": configs,
        "failed": failed,
        "unfinished": unfinished,
    }
    optional = ("orders", "failed", "unfinished")
    return {k: v for k, v in out.items() if v or k not in optional}


def _sizes(text: str) -> dict[str, int]:
    """ "B=64,K=2" as a dict."""
    pairs = (part.split("=") for part in text.split(","))
    return {name: int(value) for name, value in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tuner from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=sorted(CASES))
    parser.add_argument("--small", action="store_true", help="try the tuner itself")
    parser.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--out", type=Path, help="write it to this folder instead")
    parser.add_argument(
        "--implementation",
        nargs="+",
        default=(),
        choices=[name for name in IMPLEMENTATIONS if name != "xla"],
        help="only these",
    )
    parser.add_argument(
        "--case", nargs="+", default=(), type=_sizes, help="only these, as in B=64"
    )
    args = parser.parse_args(argv)
    folder = args.out or (TUNED / device_slug(current_device_kind()))
    path = folder / f"{args.op}.json"
    old: dict[str, Any] = {}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))

    def write(record: Mapping[str, Any]) -> None:
        if not (args.write or args.out):
            return
        record = merged(old, record, bool(args.implementation or args.case))
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    record = tune(
        args.op,
        args.small,
        implementations=args.implementation,
        only=args.case,
        on_progress=write,
    )
    write(record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
