"""The commit: cases for the tuner."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.commit_blocks import pallas_mosaic_gpu as mosaic
from pallas_kernels.commit_blocks import pallas_triton as triton
from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.commit_blocks.operands import checked
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Blocks of 32 KiB out of a staging area, a tenth of them to be committed.

    First those that lie there in 8 bits: the record's first entry that fits is used,
    and that of the others fits all.
    """
    rows, links = (64, 2) if small else (3072, 8)
    slots = jnp.ones((rows, 64, 2, 128), jnp.bfloat16)
    staged = jnp.full_like(slots, 2)
    order = jax.random.permutation(jax.random.key(0), rows).astype(jnp.int32)
    chance = jax.random.uniform(jax.random.key(1), (rows,))
    indices = jnp.where(chance < 0.1, order, -1)

    functions = {
        "mosaic_gpu": mosaic.commit_blocks_mosaic_gpu,
        "triton": triton.commit_blocks_triton,
    }

    def run(name, config, slots, staged, indices, scales=None):
        def step(_, slots):
            if config is None:
                return commit_blocks(
                    slots, staged, indices, scales=scales, implementation=name
                )
            operands = checked(slots, staged, indices, scales=scales)
            return functions[name](operands, config=config)

        # A loop carries the slots, as decode does: they are updated in place.
        return jax.lax.fori_loop(0, links, step, slots)

    of_triton = [
        triton.Config(programs, part * 1024)
        for programs in (132, 528)
        for part in (8, 16, 32)
    ]
    whole = jnp.full(staged.shape, 3, jnp.int8)
    scales = jax.random.uniform(jax.random.key(2), (rows, 256))
    yield Case(
        {"int8": 1},
        (slots, whole, indices, scales),
        run,
        {"triton": of_triton},
        links=links,
        order={"int8": True},
    )
    yield Case(
        {},
        (slots, staged, indices),
        run,
        {
            "triton": of_triton,
            "mosaic_gpu": [mosaic.Config(n) for n in (132, 264, 528)],
        },
        links=links,
    )
