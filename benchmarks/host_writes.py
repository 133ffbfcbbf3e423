"""How a layer's new blocks can go into host memory, and how fast.

  python -m benchmarks.host_writes [--blocks 2048] [--json FILE]

A prefill writes every layer's blocks [heads, blocks, 64, 2, 128] into the pinned array
of all layers, which the call donates. What is written is checked. `replaced` is the
link: a copy into an array of its own.
"""

import argparse
import functools
import pathlib
import statistics
import time

HEADS = 2
BLOCK = (64, 2, 128)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2048, help="of a head, to write")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    parser.add_argument("--json", type=pathlib.Path, help="also write figures here")
    return parser


def _in_chunks(store, piece, count, *, chunk: int, by_head: bool):
    """Chunks in a loop with as many passes as `count` asks for, as in a prefill."""
    from jax import lax

    from sparda_jax.cache.memory import to_host

    def put(store, head, first, heads):
        at = (head, first, 0, 0, 0)
        part = lax.dynamic_slice(piece, at, (heads, chunk, *piece.shape[2:]))
        return lax.dynamic_update_slice(store, to_host(part)[None], (1, *at))

    def save(number, store):
        first = number * chunk
        if not by_head:
            return put(store, 0, first, piece.shape[0])
        for head in range(piece.shape[0]):
            store = put(store, head, first, 1)
        return store

    return lax.fori_loop(0, count // chunk, save, store)


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
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        store = jax.block_until_ready(call(store, piece, jnp.int32(blocks)))
        seconds.append(time.perf_counter() - begun)
    written = np.asarray(store)[1, :, :blocks]
    if not np.array_equal(written, np.asarray(piece)):
        raise ValueError("what was written is not what was given")
    return seconds[1:]


def main() -> None:
    """Runs the benchmark."""
    arguments = _parser().parse_args()
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
    }
    device = jax.devices()[0].device_kind
    print(f"{narrow.nbytes / 1e6:.0f} MB, {device}, JAX {jax.__version__}")
    figures: dict[str, dict] = {}

    def report(name: str, seconds: list[float]) -> None:
        rate = narrow.nbytes / statistics.median(seconds) / 1e9
        figures[name] = {"gb_per_s": rate, "ms": [s * 1e3 for s in seconds]}
        least, most = min(seconds) * 1e3, max(seconds) * 1e3
        print(f"{name:24} {rate:6.1f} GB/s ({least:.2f} … {most:.2f} ms)", flush=True)

    for name, (call, piece) in calls.items():
        store = host_zeros((3, HEADS, blocks + 64, *piece.shape[2:]), piece.dtype)
        try:
            program = jax.jit(call, donate_argnums=0)
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
    main()
