"""The plan of slots: cases for the tuner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pallas_kernels.benchmarks.plan_slots import chain, inputs
from pallas_kernels.plan_slots import pallas_triton as triton
from pallas_kernels.plan_slots.operands import Slots
from pallas_kernels.plan_slots.xla import plan_slots_xla
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Lists of a decode step of the 8B shape, a tenth of each missing."""
    budget, layers = (4, 2) if small else (96, 16)
    sizes = ((2, 4),) if small else ((16, 96), (64, 96), (64, 384), (64, 1024))
    for rows, slots in sizes:
        operands = inputs(layers, rows, slots, budget, 16 * budget)

        def run(name, config, *operands):
            f = plan_slots_xla
            if name != "xla":
                f = functools.partial(triton.plan_slots_triton, config=config)
            return chain(lambda **args: f(Slots(**args)), *operands)

        yield Case(
            {"R": rows, "C": slots, "P": budget},
            operands,
            run,
            {"triton": [triton.Config(warps) for warps in (1, 2, 4, 8, 16)]},
            links=layers,
        )
