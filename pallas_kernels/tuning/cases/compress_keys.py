"""Compressed keys: cases for the tuner."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.compress_keys import pallas_mosaic_gpu as mosaic
from pallas_kernels.compress_keys.api import compress_keys
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Keys of one long row and of many."""
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
