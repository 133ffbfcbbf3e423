"""Choosing the best blocks of rows of scores: a decode step's rows and prefill's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import Report, arguments, compile_all, measure
from pallas_kernels.choose_blocks.api import choose_blocks
from pallas_kernels.dispatch import Implementation


def chain(
    scores: Float[Array, "L rows M"],
    own: Int[Array, " rows"],
    *,
    budget: int,
    implementation: Implementation,
) -> Int[Array, "rows P"]:
    """Chooses layer by layer, as decode does, and adds the lists up."""
    out = jnp.zeros((scores.shape[1], budget), jnp.int32)
    for layer in range(scores.shape[0]):
        out = out + choose_blocks(
            scores[layer], own, budget=budget, implementation=implementation
        )
    return out


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    gpu = current_platform() == "cuda" and not args.small
    budget = 96 if gpu else 16
    forms: tuple[Implementation, ...] = ("triton", "xla") if gpu else ("xla",)
    shapes = ((16, 512), (16, 1024), (16, 2048), (64, 2048), (4096, 2048))
    report = Report("choose_blocks", args)
    cases = []
    for rows, blocks in shapes if gpu else ((3, 64), (3, 512), (1024, 64)):
        layers = 16 if rows < 1024 else 1
        scores = jax.random.normal(jax.random.key(0), (layers, rows, blocks))
        own = jnp.full((rows,), blocks - 1, jnp.int32)
        for form in forms:
            run = functools.partial(chain, budget=budget, implementation=form)
            name = f"{form}, {budget} of {blocks} blocks, {rows} rows"
            cases.append((name, run, (scores, own)))
    programs = compile_all([(run, operands) for _, run, operands in cases])
    for (name, _, operands), run in zip(cases, programs, strict=True):
        if report.has_time(name):
            report.add(measure(name, run, *operands, links=operands[0].shape[0]))
    report.finish()


if __name__ == "__main__":
    main()
