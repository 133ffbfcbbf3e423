"""Decode over listed slots: GB/s of key-value bytes beside the copy bandwidth.

Peers in the same run: the XLA form, and ``jax.nn.dot_product_attention`` (cuDNN on a
GPU, and XLA) over as many keys laid out contiguously, which needs no list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import (
    Report,
    arguments,
    compile_side_by_side,
    copy_bandwidth,
    device_kernels,
    measure,
    small_copy_bandwidth,
)
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_decode_attention.api import paged_decode_attention


def inputs(layers, batch, heads, kv_heads, head_dim, block, capacity, listed, dtype):
    """Random stack of layers and lists of distinct slots, made on the device."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (layers, batch, kv_heads, capacity, block, 2, head_dim)
    kv = jax.jit(
        lambda key: lax.map(
            lambda k: jax.random.normal(k, shape[1:], dtype),
            jax.random.split(key, layers),
        )
    )(keys[0])
    q = jax.random.normal(keys[1], (batch, heads, head_dim), dtype)
    order = jax.random.uniform(keys[2], (batch, kv_heads, capacity))
    slots = lax.top_k(order, listed)[1].astype(jnp.int32)
    return q, kv, slots, jnp.full_like(slots, block)


def decode_chain(form: Implementation, layers: int) -> Callable[..., jax.Array]:
    """Decode attention, layer after layer, each asked by what the last one gave."""

    def decode(q, kv, slots, lengths):
        for layer in range(layers):
            q = paged_decode_attention(
                q,
                kv,
                slots=slots,
                slot_lengths=lengths,
                layer=layer,
                implementation=form,
            )
        return q

    return decode


def dense_chain(form: Literal["cudnn", "xla"], layers: int) -> Callable[..., jax.Array]:
    """The same over keys in a row, in `jax.nn`."""

    def dense(q, k, v):
        for layer in range(layers):
            q = jax.nn.dot_product_attention(
                q[:, None], k[layer], v[layer], implementation=form
            )[:, 0]
        return q

    return dense


def main() -> None:
    """Runs the benchmark from the command line."""
    args = arguments(__doc__).parse_args()
    report = Report("paged_decode_attention", args)
    gpu = current_platform() == "cuda" and not args.small
    forms: tuple[Implementation, ...]
    if gpu:
        dtype, bandwidth = jnp.bfloat16, copy_bandwidth()
        print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
        # Those that tell most come first.
        cases = [(b, 32, 2, 128, 64, 256, 96) for b in (8, 64, 1, 16)]
        forms = ("mosaic_gpu", "triton", "xla")
    else:
        dtype, bandwidth = jnp.float32, None
        cases = [(1, 9, 3, 64, 64, 128, 16), (1, 9, 3, 64, 64, 32, 32)]
        forms = ("xla",)
    report.add_entries(copy_bandwidth=bandwidth)
    for batch, heads, kv_heads, head_dim, block, capacity, listed in cases:
        if not report.has_time(f"B={batch} P={listed} H={head_dim}"):
            continue
        width = jnp.dtype(dtype).itemsize
        size = batch * kv_heads * listed * block * 2 * head_dim * width
        # Enough layers that what one call reads is many times the second-level cache.
        layers = min(32, max(6, int(4e8 // size))) if gpu else 4 if args.small else 30
        q, kv, slots, lengths = inputs(
            layers, batch, heads, kv_heads, head_dim, block, capacity, listed, dtype
        )

        alike = small_copy_bandwidth(size) if gpu else None

        def note(seconds, size=size, alike=alike):
            rate = size / seconds
            if bandwidth is None or alike is None:
                return f"{rate / 1e9:7.1f} GB/s"
            return (
                f"{rate / 1e9:7.1f} GB/s = {rate / bandwidth:.0%} of a large copy, "
                f"{rate / alike:.0%} of one of this size"
            )

        operands = (q, kv, slots, lengths)
        programs = compile_side_by_side(
            [decode_chain(form, layers) for form in forms], operands
        )
        for form, run in zip(forms, programs, strict=True):
            name = f"{form} B={batch} P={listed} H={head_dim}"
            report.add(measure(name, run, *operands, links=layers, note=note))
            if gpu and form != "xla" and report.timings[-1].seconds is not None:
                for kernel, (count, total) in device_kernels(run, *operands).items():
                    print(
                        f"    {kernel[:60]} x{count}: {total / count * 1e6:.1f} us",
                        flush=True,
                    )
        contiguous = (layers, batch, listed * block, kv_heads, head_dim)
        part = kv[:, :, :, :listed].reshape(*kv.shape[:3], -1, 2, head_dim)
        part = jnp.moveaxis(part, 2, 3)
        k, v = (part[..., i, :].reshape(contiguous) for i in range(2))
        del part, kv, operands

        peer_forms: tuple[Literal["cudnn", "xla"], ...]
        peer_forms = ("cudnn", "xla") if gpu else ("xla",)
        programs = compile_side_by_side(
            [dense_chain(form, layers) for form in peer_forms], (q, k, v)
        )
        for form, run in zip(peer_forms, programs, strict=True):
            name = f"{form} dense B={batch} keys={listed * block}"
            report.add(measure(name, run, q, k, v, links=layers, note=note))
        del k, v
    report.finish()


if __name__ == "__main__":
    main()
