"""Prefill attention: cases for the tuner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import block_sparse_attention as prefill
from pallas_kernels.block_sparse_attention import pallas_mosaic_gpu as mosaic
from pallas_kernels.block_sparse_attention import pallas_triton as triton
from pallas_kernels.block_sparse_attention.operands import checked
from pallas_kernels.block_sparse_attention.xla import block_sparse_attention_xla
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """The 8B shape with 96 blocks at 16k tokens."""
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
        f = block_sparse_attention_xla
        if name != "xla":
            f = functools.partial(functions[name], config=config)
        return f(checked(q, kv, q_start=start, block_indices=lists, layer=0))

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
                mosaic.Config(in_place=True),
                mosaic.Config(),
                mosaic.Config(alternate=False),
                mosaic.Config(keys=64, stages=4),
                mosaic.Config(keys=64, stages=5),
            ],
        },
    )
