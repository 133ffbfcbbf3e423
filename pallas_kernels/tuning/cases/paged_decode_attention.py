"""Decode attention: cases for the tuner."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.benchmarks import paged_decode_attention as decode
from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu as mosaic
from pallas_kernels.paged_decode_attention import pallas_triton as triton
from pallas_kernels.paged_decode_attention.operands import checked
from pallas_kernels.paged_decode_attention.xla import paged_decode_attention_xla
from pallas_kernels.tuning.case import Case


def cases(small: bool) -> Iterator[Case]:
    """Batches of the 8B shape with 96 blocks."""
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
            f = paged_decode_attention_xla
            if name != "xla":
                f = functools.partial(functions[name], config=config)
            lse = None
            for layer in range(layers):
                lists = {"slots": slots, "slot_lengths": lengths}
                q, lse = f(checked(q, kv, layer=layer, **lists))
            return q, lse

        yield Case(
            {"B": batch, "K": kv_heads, "P": listed, "H": head_dim},
            (q, kv, slots, lengths),
            run,
            {
                "triton": list(_triton_configs(batch * kv_heads, listed)),
                "mosaic_gpu": list(_mosaic_configs(batch * kv_heads, listed)),
            },
            links=layers,
        )


def _triton_configs(pairs: int, listed: int) -> Iterator[triton.Config]:
    """One, two or four programs a multiprocessor, with shallow and deep loads."""
    splits = sorted({min(listed, max(1, n // pairs)) for n in (132, 264, 528)})
    for s in splits:
        yield triton.Config(s, 4, 3)
    # The slot is loaded before what it points at, so a stage more may be needed to have
    # as many keys in flight.
    for s, stages in itertools.product(splits[:2], (4, 5)):
        yield triton.Config(s, 4, stages)


def _mosaic_configs(pairs: int, listed: int) -> Iterator[mosaic.Config]:
    """Splits merged by XLA or in a cluster, with shallow and deep rings."""
    for cluster, programs in itertools.product((1, 2, 4, 8), (132, 264)):
        clusters = min(programs // (pairs * cluster), listed // cluster)
        if cluster > 1 and clusters > 1:
            continue  # no cluster leaves XLA as much to merge
        for stages, warpgroups in ((2, 1), (6, 2)) if clusters else ():
            yield mosaic.Config(clusters * cluster, stages, cluster, warpgroups)
