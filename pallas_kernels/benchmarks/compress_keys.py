"""Compressed keys: GB/s of keys read beside the copy bandwidth and the XLA form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import (
    Report,
    arguments,
    copy_bandwidth,
    measure,
)
from pallas_kernels.compress_keys.api import compress_keys
from pallas_kernels.dispatch import Implementation


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    report = Report("compress_keys", args)
    gpu = current_platform() == "cuda" and not args.small
    forms: tuple[Implementation, ...] = ("xla",)
    shapes, dtype, bandwidth = ((1, 3, 8192, 64),), jnp.float32, None
    if gpu:
        forms = ("mosaic_gpu", "triton", "xla")
        shapes, dtype = ((1, 2, 131072, 128), (16, 2, 131072, 128)), jnp.bfloat16
        bandwidth = copy_bandwidth()
    report.add_entries(copy_bandwidth=bandwidth)
    for shape in shapes:
        if not report.has_time(f"{shape}"):
            continue
        keys = jax.random.normal(jax.random.key(0), shape, dtype)
        moved = keys.nbytes + keys.nbytes // 16

        def note(seconds, moved=moved):
            share = "" if bandwidth is None else f" = {moved / seconds / bandwidth:.0%}"
            return f"{moved / seconds / 1e9:7.1f} GB/s{share}"

        for form in forms:

            def run(keys, form: Implementation = form):
                return compress_keys(keys, implementation=form)

            report.add(measure(f"{form} {shape}", run, keys, note=note))
    report.finish()


if __name__ == "__main__":
    main()
