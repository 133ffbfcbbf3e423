"""Planning a decode step's fetches: microseconds a layer by implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._common.dispatch import Implementation, current_platform
from pallas_kernels.benchmarks.harness import arguments, measure, report
from pallas_kernels.plan_fetch.api import plan_fetch
from pallas_kernels.plan_fetch.arg_specs import ARG_SPECS


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    gpu = current_platform() == "cuda" and not args.small
    wanted = "large" if gpu else "ci"
    forms: tuple[Implementation, ...] = ("triton", "xla") if gpu else ("xla",)
    timings = []
    for spec in (s for s in ARG_SPECS if wanted in s.tags):
        operands = spec.make()

        def note(_: float, spec=spec) -> str:
            return f"{spec.rows} rows, {spec.width} blocks, {spec.slots} slots"

        for form in forms:

            def run(operands, form: Implementation = form, spec=spec):
                # A loop carries the table, as decode does.
                def body(step, table):
                    held, used = table
                    # The lists turn, so that every step has its misses.
                    listed = (operands["listed"] + step) % spec.blocks
                    plan = plan_fetch(
                        **operands | {"listed": listed, "held": held, "used": used},
                        implementation=form,
                    )
                    return plan.blocks, plan.used + plan.count * 0 + plan.rows[0] * 0

                table = operands["held"], operands["used"]
                return jax.lax.fori_loop(jnp.int32(0), jnp.int32(8), body, table)

            name = f"{form}, {spec.name}"
            timings.append(measure(name, run, operands, links=8, note=note))
    report("plan_fetch", timings, args.out)


if __name__ == "__main__":
    main()
