"""How a layer's new blocks can go into host memory, and how fast.

  python -m benchmarks.host_writes [--blocks 2048] [--json FILE]

A prefill writes every layer's blocks [heads, blocks, 64, 2, 128] into the pinned array
of all layers, which the call donates. What is written is checked. `replaced` is the
link: a copy into an array of its own, new or donated, and where a condition that only
the program knows says whether it is replaced. The kernels are those of `commit_blocks`,
whose target then lies in host memory: alone, or in a call whose results are said to.
"""

import argparse
import functools
import statistics
import sys
import time
from typing import Any

from benchmarks.parsers import benchmark_parser
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option

HEADS = 2
BLOCK = (64, 2, 128)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("host_writes", __doc__)
    parser.add_argument("--blocks", type=int, default=2048, help="of a head, to write")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    add_file_option(parser)
    return parser


def _in_chunks(store, piece, count, *, chunk: int, by_head: bool, unrolled: int = 1):
    """Chunks in a loop with as many passes as `count` asks for, as in a prefill."""
    from jax import lax

    from sparda_jax.cache.memory import to_host

    def put(store, head, first, heads):
        at = (head, first, 0, 0, 0)
        part = lax.dynamic_slice(piece, at, (heads, chunk, *piece.shape[2:]))
        return lax.dynamic_update_slice(store, to_host(part)[None], (1, *at))

    def save(number, store):
        for part in range(unrolled):
            first = (number * unrolled + part) * chunk
            if not by_head:
                store = put(store, 0, first, piece.shape[0])
                continue
            for head in range(piece.shape[0]):
                store = put(store, head, first, 1)
        return store

    return lax.fori_loop(0, count // (chunk * unrolled), save, store)


def _by_kernel(store, piece, count, *, implementation: Any, said: bool):
    """A kernel whose aliased operand is the pinned array."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.compute_on import compute_on

    from pallas_kernels.commit_blocks.api import commit_blocks

    del count
    _, heads, room, *rest = store.shape
    blocks = piece.shape[1]
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    rows = ((heads + head) * room + jnp.arange(blocks, dtype=jnp.int32)).reshape(-1)

    def commit(held, staged, rows):
        return commit_blocks(held, staged, rows, implementation=implementation)

    call: Any = commit
    if said:
        space = jax.memory.Space.Host
        call = compute_on(commit, compute_type="gpu_stream:1", out_memory_spaces=space)
    done = call(store.reshape(-1, *rest), piece.reshape(-1, *rest), rows)
    return done.reshape(store.shape)


def _replaced(store, piece, count, *, conditional: bool):
    """A layer's array is another one afterwards, in the donated one's memory."""
    from jax import lax

    from sparda_jax.cache.memory import to_host

    if not conditional:
        return to_host(piece)
    return lax.cond(count > 1, lambda old: to_host(piece), lambda old: old, store)


def _by_head(store, piece, count):
    """All of a head at a place that is known when the program is made."""
    from jax import lax

    from sparda_jax.cache.memory import to_host

    del count
    for head in range(piece.shape[0]):
        part = to_host(piece[head][None, None])
        store = lax.dynamic_update_slice(
            store, part, (1, head, *(0,) * (piece.ndim - 1))
        )
    return store


def _measure(call, store, piece, repeats: int) -> list[float]:
    """Seconds of each call; what was written is compared once."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    blocks = piece.shape[1]
    seconds: list[float] = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        store = jax.block_until_ready(call(store, piece, jnp.int32(blocks)))
        seconds.append(time.perf_counter() - begun)
    written = np.asarray(store)
    if written.shape != piece.shape:
        written = written[1, :, :blocks]
    if not np.array_equal(written, np.asarray(piece)):
        raise ValueError("what was written is not what was given")
    return seconds[1:]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from sparda_jax.cache.memory import host_zeros, to_host
    from sparda_jax.checkpoint.atomic import write_json
    from sparda_jax.runtime import configure_offload

    configure_offload()
    blocks = arguments.blocks
    narrow = jax.random.normal(jax.random.key(0), (HEADS, blocks, *BLOCK), jnp.bfloat16)
    pairs = narrow.reshape(*narrow.shape[:-1], BLOCK[-1] // 2, 2)
    wide = jax.lax.bitcast_convert_type(pairs, jnp.uint32)
    chunks = functools.partial(functools.partial, _in_chunks)
    calls = {
        "chunks of 64 blocks": (chunks(chunk=64, by_head=False), narrow),
        "chunks of 512 blocks": (chunks(chunk=512, by_head=False), narrow),
        "chunks of 64 by head": (chunks(chunk=64, by_head=True), narrow),
        "chunks of 512 by head": (chunks(chunk=512, by_head=True), narrow),
        "whole heads": (_by_head, narrow),
        "chunks of 64, 32-bit": (chunks(chunk=64, by_head=False), wide),
        "whole heads, 32-bit": (_by_head, wide),
        "chunks of 32 blocks": (chunks(chunk=32, by_head=False), narrow),
        "chunks of 16 blocks": (chunks(chunk=16, by_head=False), narrow),
        "chunks of 32, 2 a pass": (chunks(chunk=32, by_head=False, unrolled=2), narrow),
        "chunks of 16, 4 a pass": (chunks(chunk=16, by_head=False, unrolled=4), narrow),
        "chunks of 8, 8 a pass": (chunks(chunk=8, by_head=False, unrolled=8), narrow),
        "replaced, donated": (
            functools.partial(_replaced, conditional=False),
            narrow,
        ),
        "replaced, if so": (functools.partial(_replaced, conditional=True), narrow),
    }
    if jax.default_backend() == "gpu":
        for implementation in ("triton", "mosaic_gpu"):
            for said in (True, False):
                name = f"{implementation}, {'said' if said else 'alone'}"
                kernel = functools.partial(
                    _by_kernel, implementation=implementation, said=said
                )
                calls[name] = (kernel, narrow)
    device = jax.devices()[0].device_kind
    print(f"{narrow.nbytes / 1e6:.0f} MB, {device}, JAX {jax.__version__}")
    figures: dict[str, dict] = {}

    def report(name: str, seconds: list[float]) -> None:
        rate = narrow.nbytes / statistics.median(seconds) / 1e9
        figures[name] = {"gb_per_s": rate, "ms": [s * 1e3 for s in seconds]}
        least, most = min(seconds) * 1e3, max(seconds) * 1e3
        print(f"{name:24} {rate:6.1f} GB/s ({least:.2f} … {most:.2f} ms)", flush=True)

    for name, (call, piece) in calls.items():
        shape = (3, HEADS, blocks + 64, *piece.shape[2:])
        if name.startswith("replaced"):
            shape = piece.shape
        store = host_zeros(shape, piece.dtype)
        try:
            # Else a result's kind of memory is that of what made it, by its type.
            program = jax.jit(call, donate_argnums=0, out_shardings=store.sharding)
            report(name, _measure(program, store, piece, arguments.repeats))
        except Exception as error:  # one way's refusal must not hide the others
            print(f"{name:24} refused: {str(error)[:120]}", flush=True)
    replace = jax.jit(lambda x: to_host(x))
    seconds = []
    for _ in range(arguments.repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(replace(narrow))
        seconds.append(time.perf_counter() - begun)
    report("replaced", seconds[1:])
    if arguments.json:
        record = {"device": device, "jax": jax.__version__, "ways": figures}
        write_json(arguments.json, record)


if __name__ == "__main__":
    sys.exit(main())
