"""Scoring and choosing blocks: Forecast (raw) beside the own-query (softmax) form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import (
    Report,
    arguments,
    compile_side_by_side,
    measure,
)
from pallas_kernels.block_scores.api import block_scores, select_blocks
from pallas_kernels.dispatch import Implementation


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    gpu = current_platform() == "cuda" and not args.small
    raw_forms: tuple[Implementation, ...]
    softmax_forms: tuple[Implementation, ...]
    if gpu:
        tokens, heads, kv_heads, head_dim = args.tokens or 131072, 32, 2, 128
        budget, local, dtype = 96, 33, jnp.bfloat16
        raw_forms = ("mosaic_gpu", "triton", "xla")
        softmax_forms = ("mosaic_gpu", "triton")
    else:
        tokens, heads, kv_heads, head_dim = args.tokens or 8192, 9, 3, 64
        budget, local, dtype = 16, 8, jnp.float32
        raw_forms, softmax_forms = ("xla",), ("xla",)
    blocks, windows = tokens // 64, (tokens - 32) // 16 + 1
    keys = jax.random.split(jax.random.key(0), 3)
    forecast = jax.random.normal(keys[0], (1, tokens, kv_heads, head_dim), dtype)
    own = jax.random.normal(keys[1], (1, tokens, heads, head_dim), dtype)
    compressed = jax.random.normal(keys[2], (1, kv_heads, windows, head_dim), dtype)
    start = jnp.zeros((1,), jnp.int32)
    report = Report("block_scores", args)
    sizes = {"blocks": blocks, "local_blocks": local}
    for name, forms, query in (
        ("Forecast", raw_forms, forecast),
        ("own query", softmax_forms, own),
    ):
        if not report.has_time(f"{name}, T={tokens}"):
            continue
        softmax, operands = query is own, (query, compressed, start)
        calls = []
        for form in forms:

            def select(
                query,
                compressed,
                start,
                form: Implementation = form,
                softmax=softmax,
            ):
                return select_blocks(
                    query,
                    compressed,
                    q_start=start,
                    budget=budget,
                    softmax=softmax,
                    implementation=form,
                    **sizes,
                )

            def score(
                query,
                compressed,
                start,
                form: Implementation = form,
                softmax=softmax,
            ):
                scores = block_scores(
                    query,
                    compressed,
                    q_start=start,
                    softmax=softmax,
                    implementation=form,
                    **sizes,
                )
                # The part that no reduction removes: every score is written.
                return scores

            calls.append((f"{name}, scores, {form}, T={tokens}", score))
            calls.append((f"{name}, scores and choice, {form}, T={tokens}", select))
        programs = compile_side_by_side([run for _, run in calls], operands)
        for (title, _), run in zip(calls, programs, strict=True):
            report.add(measure(title, run, *operands, repeats=5))
    best: dict[str, float] = {}
    for timing in report.timings:
        name, *rest = timing.name.split(", ")
        if rest[0] == "scores and choice" and timing.seconds is not None:
            best[name] = min(timing.seconds, best.get(name, timing.seconds))
    if len(best) == 2:
        ratio = best["own query"] / best["Forecast"]
        print(f"Forecast is {ratio:.2f} times as fast as own queries (with choice)")
        report.add_entries(own_query_over_forecast=ratio)
    report.finish()


if __name__ == "__main__":
    main()
