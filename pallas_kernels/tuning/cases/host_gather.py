"""The host gather: cases for the tuner."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.host_gather import pallas_mosaic_gpu as mosaic
from pallas_kernels.host_gather import pallas_triton as triton
from pallas_kernels.host_gather.api import host_gather
from pallas_kernels.host_gather.operands import checked
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Blocks of 32 KiB out of pinned host memory."""
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
        return functions[name](checked(host, index), config=config)

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
