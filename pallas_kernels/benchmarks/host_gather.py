"""Fetching listed blocks from pinned host memory: GB/s beside a contiguous copy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import Report, arguments, measure
from pallas_kernels.dispatch import Implementation
from pallas_kernels.host_gather.api import host_gather


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    gpu = current_platform() == "cuda" and not args.small
    rows, count, dtype = (65536, 1536, jnp.bfloat16) if gpu else (512, 96, jnp.float32)
    shape = (rows, 64, 2, 128)
    # Part by part: the array in device memory would be as large again.
    host = jax.device_put(
        jnp.ones(shape, dtype),
        jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    )
    index = jax.random.permutation(jax.random.key(0), rows)[:count].astype(jnp.int32)
    size = count * host.nbytes // rows

    def note(seconds):
        return f"{size / seconds / 1e9:6.1f} GB/s"

    report = Report("host_gather", args)
    forms: tuple[Implementation, ...] = ("mosaic_gpu", "triton")
    if gpu:
        for form in forms:
            for programs in (8, 16, 32, 64, 132):

                def run(host, index, form: Implementation = form, programs=programs):
                    return host_gather(
                        host, index, programs=programs, implementation=form
                    )

                name = f"{form} {programs} programs"
                if report.has_time(name):
                    report.add(measure(name, run, host, index, note=note))
    small = index[: max(1, count // 8)]

    def portable(host, index):
        return host_gather(host, index, implementation="xla")

    def portable_note(seconds):
        return f"{size / 8 / seconds / 1e9:6.1f} GB/s"

    if report.has_time("xla loop"):
        report.add(measure("xla loop", portable, host, small, note=portable_note))

    def copy(host):
        return jax.device_put(host[:count], jax.memory.Space.Device)

    if report.has_time("contiguous copy"):
        report.add(measure("contiguous copy", copy, host, note=note))
    report.finish()


if __name__ == "__main__":
    main()
