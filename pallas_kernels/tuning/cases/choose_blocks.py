"""The choice of blocks: cases for the tuner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.choose_blocks import pallas_triton as triton
from pallas_kernels.choose_blocks.xla import choose_blocks_xla
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Rows of a decode step of the 8B shape behind 32k and 128k tokens.

    A row also has blocks for its answer: never 512 alone, which XLA sorts faster.
    """
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
