"""Committing staged blocks into slots: microseconds by implementation and misses.

Blocks of 32 KiB, as they are and in 8 bits; the latter are decoded on the way.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import Report, arguments, measure
from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.dispatch import Implementation


def _chain(form: Implementation, slots, indices, staged, scales=None):
    def step(_, slots):
        return commit_blocks(slots, staged, indices, scales=scales, implementation=form)

    # A loop carries the slots, as decode does: they are updated in place.
    return jax.lax.fori_loop(0, 8, step, slots)


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    gpu = current_platform() == "cuda" and not args.small
    rows, dtype = (3072, jnp.bfloat16) if gpu else (96, jnp.float32)
    block = (64, 2, 128)
    slots = jnp.ones((rows, *block), dtype)
    staged = jnp.full((rows, *block), 2, dtype)
    operands = {
        "exact": (staged,),
        "int8": (
            jnp.full(staged.shape, 3, jnp.int8),
            jax.random.uniform(jax.random.key(2), (rows, 256)),
        ),
    }
    order = jax.random.permutation(jax.random.key(0), rows).astype(jnp.int32)
    chance = jax.random.uniform(jax.random.key(1), (rows,))
    forms: tuple[Implementation, ...] = ("xla",)
    if gpu:
        forms = ("mosaic_gpu", "triton", "xla")
    report = Report("commit_blocks", args)
    for share in (0.0, 0.02, 0.1, 1.0):
        indices = jnp.where(chance < share, order, -1)
        committed = int(jnp.sum(indices >= 0))
        for kind, arrays in operands.items():
            if not report.has_time(f"{kind}, {share:.0%} of {rows} entries"):
                continue
            size = committed * sum(x.nbytes // rows for x in (slots, *arrays))

            def note(seconds, size=size):
                return f"{size / seconds / 1e9:7.1f} GB/s read and written"

            for form in forms:
                if (form, kind) == ("mosaic_gpu", "int8"):
                    continue  # it has none
                run = functools.partial(_chain, form)
                name = f"{form}, {kind}, {share:.0%} of {rows} entries"
                report.add(
                    measure(name, run, slots, indices, *arrays, links=8, note=note)
                )
    report.finish()


if __name__ == "__main__":
    main()
