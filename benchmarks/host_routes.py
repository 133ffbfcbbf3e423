"""How listed blocks can come out of host memory, and how fast: every route at once.

  python -m benchmarks.host_routes [--gib 4] [--blocks 1536] [--json FILE]

Blocks of 64 tokens × 256 bfloat16 (32 KiB), random, out of one pinned array. Beside the
project's routes stand the ways that a first attempt would take: one large copy (the
link), a gather on the host array (which XLA computes on the host), NumPy and
`device_put`. Results are checked. What overlaps with compute is another question:
`python -m benchmarks.offload --profile`.
"""

import argparse
import pathlib
import statistics
import time
import warnings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4, help="size of the host array")
    parser.add_argument("--blocks", type=int, default=1536, help="blocks to fetch")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls")
    parser.add_argument("--json", type=pathlib.Path, help="also write figures here")
    return parser


def main() -> None:
    """Runs the benchmark."""
    arguments = _parser().parse_args()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sparda_jax.cache.memory import host_sharding, to_device, to_host
    from sparda_jax.cache.routes import named_route, route_names
    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.runtime import configure_offload

    configure_offload()
    shape = (64, 2, 128)
    block_bytes = 2 * 64 * 2 * 128
    rows = max(2, int(arguments.gib * 2**30) // block_bytes)
    listed = min(arguments.blocks, rows)
    numbers = np.arange(rows, dtype=np.float32)[:, None, None, None] % 251
    held = np.broadcast_to(numbers, (rows, *shape)).astype(jnp.bfloat16)
    store = jax.device_put(held, host_sharding())
    chosen = np.random.default_rng(0).choice(rows, listed, replace=False)
    wanted = jnp.asarray(chosen, jnp.int32)

    def gather(store, wanted):
        return to_device(store.at[to_host(wanted)].get(mode="promise_in_bounds"))

    gathered = jax.jit(gather)
    copied = jax.jit(lambda store: to_device(store[:listed]))
    calls = {
        "one contiguous copy": lambda: copied(store),
        **{name: named_route(name).repeatable(store, chosen) for name in route_names()},
        "gather on the host array": lambda: gathered(store, wanted),
    }
    device = jax.devices()[0].device_kind
    print(
        f"{listed} blocks of {block_bytes >> 10} KiB, {device}, JAX {jax.__version__}"
    )
    figures = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # XLA's notes on host computation
                got = np.asarray(jax.block_until_ready(call())[:, 0, 0, 0])
                seconds = []
                for _ in range(arguments.repeats):
                    begun = time.perf_counter()
                    jax.block_until_ready(call())
                    seconds.append(time.perf_counter() - begun)
        except Exception as error:  # a route's refusal must not hide the others
            print(f"{name:28} refused: {str(error)[:120]}", flush=True)
            continue
        expected = np.arange(listed) if name.startswith("one") else chosen
        right = np.array_equal(got.astype(np.float32), expected % 251)
        median = statistics.median(seconds)
        rate = listed * block_bytes / median / 1e9
        figures[name] = {"gb_per_s": rate, "ms": median * 1e3, "right": bool(right)}
        print(
            f"{name:28} {rate:7.2f} GB/s  {median * 1e3:8.2f} ms "
            f"({min(seconds) * 1e3:.2f} … {max(seconds) * 1e3:.2f})  "
            f"{'checked' if right else 'WRONG RESULT'}",
            flush=True,
        )
    if arguments.json:
        record = {"device": device, "jax": jax.__version__, "routes": figures}
        write_json(arguments.json, record)


if __name__ == "__main__":
    main()
