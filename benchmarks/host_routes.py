"""How listed blocks can come out of host memory, and how fast: every route at once.

  python -m benchmarks.host_routes [--gib 4] [--blocks 1536] [--json FILE]

Blocks of 64 tokens × 256 bfloat16 (32 KiB), random, out of one pinned array. Beside the
project's routes stand the ways that a first attempt would take: one large copy (the
link), a gather on the host array (which XLA computes on the host), NumPy and
`device_put`. Results are checked. What overlaps with compute is another question:
`python -m benchmarks.offload --profile`.
"""

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

from sparda_jax.checks import integer, number
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_file_option, add_option

BLOCK_BYTES = 2 * 64 * 2 * 128


@dataclasses.dataclass(frozen=True)
class RouteTime:
    """How long one way of fetching took.

    Attributes:
      name: Of the way.
      seconds: Of each timed call; empty if it was refused.
      rate: Bytes a second, by the median; 0 if it was refused.
      right: Whether the blocks that came are the listed ones.
      refusal: Why it cannot run here; "" if it can.
    """

    name: str
    seconds: tuple[float, ...] = ()
    rate: float = 0.0
    right: bool = False
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.name:28} refused: {self.refusal[:120]}"
        least, middle, most = (
            1e3 * f(self.seconds) for f in (min, statistics.median, max)
        )
        return (
            f"{self.name:28} {self.rate / 1e9:7.2f} GB/s  {middle:8.2f} ms "
            f"({least:.2f} … {most:.2f})  {'checked' if self.right else 'WRONG RESULT'}"
        )


def time_routes(gib: float, blocks: int, repeats: int) -> Iterator[RouteTime]:
    """Times every way to fetch, one after the other.

    Args:
      gib: Size of the array in host memory.
      blocks: Random blocks that a call fetches; at most as many as the array has.
      repeats: Timed calls of each, after one that is checked.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sparda_jax.cache.memory import host_sharding

    rows = max(2, int(gib * 2**30) // BLOCK_BYTES)
    listed = min(blocks, rows)
    numbers = np.arange(rows, dtype=np.float32)[:, None, None, None] % 251
    held = np.broadcast_to(numbers, (rows, 64, 2, 128)).astype(jnp.bfloat16)
    store = jax.device_put(held, host_sharding())
    chosen = np.random.default_rng(0).choice(rows, listed, replace=False)
    for name, call in _calls(store, chosen).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # XLA's notes on host computation
                got = np.asarray(jax.block_until_ready(call())[:, 0, 0, 0])
                seconds = []
                for _ in range(repeats):
                    begun = time.perf_counter()
                    jax.block_until_ready(call())
                    seconds.append(time.perf_counter() - begun)
        except Exception as error:  # a route's refusal must not hide the others
            yield RouteTime(name, refusal=" ".join(str(error).split()))
            continue
        expected = np.arange(listed) if name.startswith("one") else chosen
        right = np.array_equal(got.astype(np.float32), expected % 251)
        rate = listed * BLOCK_BYTES / statistics.median(seconds)
        yield RouteTime(name, tuple(seconds), rate, bool(right))


def _calls(store, chosen) -> dict[str, Callable]:
    """A call a way: the link first, the routes, XLA's own gather."""
    import jax
    import jax.numpy as jnp

    from sparda_jax.cache.memory import to_device, to_host
    from sparda_jax.cache.routes import named_route, route_names

    wanted = jnp.asarray(chosen, jnp.int32)

    def gather(store, wanted):
        return to_device(store.at[to_host(wanted)].get(mode="promise_in_bounds"))

    gathered = jax.jit(gather)
    copied = jax.jit(lambda store: to_device(store[: len(chosen)]))
    return {
        "one contiguous copy": lambda: copied(store),
        **{name: named_route(name).repeatable(store, chosen) for name in route_names()},
        "gather on the host array": lambda: gathered(store, wanted),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    size = number(above=0, most=2**20)
    add_option(
        parser, "--gib", size, metavar="X", default=4, help="size of the host array"
    )
    for name, default, what in (
        ("--blocks", 1536, "blocks to fetch"),
        ("--repeats", 15, "timed calls"),
    ):
        add_option(parser, name, integer(1), metavar="N", default=default, help=what)
    add_file_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    import jax

    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.runtime import configure_offload

    configure_offload()
    device = jax.devices()[0].device_kind
    size = BLOCK_BYTES >> 10
    print(f"{arguments.blocks} blocks of {size} KiB, {device}, JAX {jax.__version__}")
    figures = {}
    for found in time_routes(arguments.gib, arguments.blocks, arguments.repeats):
        print(found, flush=True)
        if not found.refusal:
            figures[found.name] = {
                "gb_per_s": found.rate / 1e9,
                "ms": statistics.median(found.seconds) * 1e3,
                "right": found.right,
            }
    if arguments.json:
        record = {"device": device, "jax": jax.__version__, "routes": figures}
        write_json(arguments.json, record)


if __name__ == "__main__":
    raise SystemExit(main())
