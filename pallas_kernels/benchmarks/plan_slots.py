"""Planning which slots listed blocks take: microseconds by implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import (
    Report,
    arguments,
    compile_all,
    measure,
)
from pallas_kernels.dispatch import Implementation
from pallas_kernels.plan_slots.api import plan_slots
from pallas_kernels.plan_slots.arg_specs import ArgSpec
from pallas_kernels.plan_slots.plan import SlotPlan

NAMES = ("blocks", "last_used", "page_table", "listed", "step", "tail_block")


def inputs(
    layers: int, rows: int, capacity: int, budget: int, blocks: int = 512
) -> tuple[Int[Array, "layers rows *_"], ...]:
    """Tables, lists, steps and tail blocks of ``layers`` layers, a tenth missing."""
    spec = ArgSpec("", (layers, rows), capacity, budget, blocks, 0.1, 0.0)
    args = spec.make()
    return tuple(args[name] for name in NAMES)


def chain(
    plan: Callable[..., SlotPlan], *layers: Int[Array, "layers rows *_"]
) -> list[SlotPlan]:
    """Plans layer by layer, as decode does: each waits for the one before."""
    plans, bound = [], jnp.int32(0)
    for number, layer in enumerate(zip(*layers, strict=True)):
        layer, bound = jax.lax.optimization_barrier((layer, bound))
        args = dict(zip(NAMES, layer, strict=True))
        args["source"] = jnp.int32(number * args["page_table"].size)
        args["target"] = jnp.int32(number * args["blocks"].size)
        plans.append(plan(**args))
        bound = plans[-1].bound
    return plans


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    gpu = current_platform() == "cuda" and not args.small
    forms: tuple[Implementation, ...] = ("triton", "xla") if gpu else ("xla",)
    layers = 4 if args.small else 16
    report = Report("plan_slots", args)
    sizes = [(rows, 96, 512) for rows in ((16, 64) if gpu else (2, 8))]
    sizes += [(64, slots, 2048) for slots in (384, 1024)] if gpu else []
    cases = []
    for rows, slots, blocks in sizes:
        operands = inputs(layers, rows, slots, 96, blocks)
        for form in forms:
            plan = functools.partial(plan_slots, implementation=form)
            name = f"{form}, 96 of {blocks} blocks, {slots} slots, {rows} rows"
            cases.append((name, functools.partial(chain, plan), operands))
    programs = compile_all([(run, operands) for _, run, operands in cases])
    for (name, _, operands), run in zip(cases, programs, strict=True):
        if report.has_time(name):
            report.add(measure(name, run, *operands, links=layers))
    report.finish()


if __name__ == "__main__":
    main()
