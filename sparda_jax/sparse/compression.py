"""Compressed keys: means over windows of κ = 2σ keys every σ keys, kept incrementally.

A window is the sum of two neighbouring half windows of σ keys, so it is enough to keep,
beside the finished windows, the sum of the last whole half and of the half that is
growing. One function serves a whole prompt, a further turn and a single decode step.

Finished windows are kept in the keys' type, or as 8-bit integers with a scale a window:
a window is finished once, so that it is rounded once.

Source: docs/algorithm.md §2.2 (first level only: the second is never read by the
kernels), §7.10 for the half-window sums.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from sparda_jax.config import SparseConfig

# Of 8-bit integers: the largest magnitude that shares a scale is 127 of them.
_STEP = np.float32(1 / 127)


class CompressedKeys(NamedTuple):
    """Finished windows and the two half sums that the next window needs.

    Attributes:
      windows: [layers, B, K, W, H]; window m averages keys σm … σm+κ−1. Only windows
        that lie wholly inside a row are finished; the others hold garbage.
      halves: float32 [layers, B, K, 2, H]: sum of the last whole half, sum of the
        growing one.
    """

    windows: Float[Array, "layers B K W H"]
    halves: Float[Array, "layers B K 2 H"]

    @property
    def num_windows(self) -> int:
        """W."""
        return self.windows.shape[-2]

    def put(self, where: tuple, means: Float[Array, "B K n H"]) -> "CompressedKeys":
        """With finished windows put at some places; the rest is dropped."""
        means = means.astype(self.windows.dtype)
        return self._replace(windows=self.windows.at[where].set(means, mode="drop"))


class Int8CompressedKeys(NamedTuple):
    """The same with windows in 8 bits a number.

    A number x of a window is kept as round(x / s), s being the largest magnitude of its
    window over 127.

    Attributes:
      whole: int8 [layers, B, K, W, H].
      scales: float32 [layers, B, K, W].
      halves: As those of `CompressedKeys`.
    """

    whole: Int8[Array, "*lead W H"]
    scales: Float[Array, "*lead W"]
    halves: Float[Array, "*lead 2 H"]

    @property
    def windows(self) -> Float[Array, "*lead W H"]:
        """The windows in float32."""
        return self.whole.astype(jnp.float32) * self.scales[..., None]

    def scores(self, query: Float[Array, "B T K H"]) -> Float[Array, "B K T W"]:
        """Products of few queries with all windows of a layer, float32.

        A sum of products, which compilers make in one pass over the integers; for a
        matrix product they might first write the windows out.
        """
        query = jnp.swapaxes(query, 1, 2)[:, :, :, None].astype(jnp.float32)
        whole = self.whole[:, :, None].astype(jnp.float32)
        return jnp.sum(query * whole, axis=-1) * self.scales[:, :, None]

    @property
    def num_windows(self) -> int:
        """W."""
        return self.scales.shape[-1]

    def put(self, where: tuple, means: Float[Array, "B K n H"]) -> "Int8CompressedKeys":
        """As `CompressedKeys.put`."""
        # A product: compilers make one of a division by a constant, but not always.
        scales = jnp.max(jnp.abs(means), axis=-1) * _STEP
        quotient = means / jnp.where(scales > 0, scales, 1)[..., None]
        whole = jnp.clip(jnp.round(quotient), -127, 127).astype(jnp.int8)
        return self._replace(
            whole=self.whole.at[where].set(whole, mode="drop"),
            scales=self.scales.at[where].set(scales, mode="drop"),
        )


def empty_windows(
    lead: tuple[int, ...], windows: int, width: int, dtype: DTypeLike
) -> CompressedKeys:
    """No windows yet; `lead` is (layers, B, K)."""
    return CompressedKeys(
        windows=jnp.zeros((*lead, windows, width), dtype),
        halves=jnp.zeros((*lead, 2, width), jnp.float32),
    )


def empty_int8_windows(
    lead: tuple[int, ...], windows: int, width: int
) -> Int8CompressedKeys:
    """No windows yet, in 8 bits; `lead` is (layers, B, K)."""
    return Int8CompressedKeys(
        whole=jnp.zeros((*lead, windows, width), jnp.int8),
        scales=jnp.zeros((*lead, windows), jnp.float32),
        halves=jnp.zeros((*lead, 2, width), jnp.float32),
    )


def compress_keys(
    k: Float[Array, "B S K H"], sparse: SparseConfig
) -> Float[Array, "B K W H"]:
    """All complete windows of whole rows: the readable form of the definition.

    W = max(0, ⌊(S − κ)/σ⌋ + 1); float32 mean (docs/algorithm.md §2.2).
    """
    kernel, stride = sparse.kernel_size, sparse.kernel_stride
    count = max(0, (k.shape[1] - kernel) // stride + 1)
    index = jnp.arange(count)[:, None] * stride + jnp.arange(kernel)
    means = jnp.mean(k[:, index].astype(jnp.float32), axis=2)
    return jnp.swapaxes(means, 1, 2).astype(k.dtype)


def _half_sums(
    k: Float[Array, "B T K H"], offset: Int[Array, " B"], stride: int
) -> Float[Array, "B halves K H"]:
    """Sums over halves of `stride` tokens, the first token standing at `offset`."""
    steps = k.shape[1]
    if steps == 1:
        return k
    halves = -(-(steps + stride - 1) // stride)
    source = jnp.arange(halves * stride)[None, :] - offset[:, None]
    inside = (source >= 0) & (source < steps)
    index = jnp.clip(source, 0, steps - 1)[:, :, None, None]
    aligned = jnp.take_along_axis(k, index, axis=1)
    aligned = jnp.where(inside[:, :, None, None], aligned, 0)
    return aligned.reshape(k.shape[0], halves, stride, *k.shape[2:]).sum(axis=2)


def append_windows(
    keys: CompressedKeys | Int8CompressedKeys,
    layer: int | Int[Array, ""],
    k: Float[Array, "B T K H"],
    *,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    sparse: SparseConfig,
) -> CompressedKeys | Int8CompressedKeys:
    """Extends the windows by `count` tokens of every row.

    Args:
      keys: Windows and half sums so far.
      layer: Index on the leading axis.
      k: T new keys a row; those from `count` on are ignored.
      start: Keys that each row held before.
      count: Valid new keys of each row.
      sparse: Window geometry.
    """
    stride = sparse.kernel_stride
    steps = k.shape[1]
    valid = jnp.arange(steps)[None, :] < count[:, None]
    fresh = jnp.where(valid[:, :, None, None], k.astype(jnp.float32), 0)
    old = jnp.swapaxes(keys.halves[layer], 1, 2)  # B 2 K H
    sums = _half_sums(fresh, start % stride, stride)
    sums = sums.at[:, 0].add(old[:, 1])
    # `chain[j]` is half start//σ − 1 + j; windows pair neighbours.
    chain = jnp.concatenate((old[:, :1], sums), axis=1)
    means = (chain[:, :-1] + chain[:, 1:]) / sparse.kernel_size
    first = start // stride - 1
    index = first[:, None] + jnp.arange(means.shape[1])
    end = start + count
    finished = (index >= 0) & (index * stride + sparse.kernel_size <= end[:, None])
    out_of_range = keys.num_windows
    index = jnp.where(finished, index, out_of_range)
    rows = jnp.arange(k.shape[0])[:, None, None]
    kv_heads = jnp.arange(k.shape[2])[None, :, None]
    where = (layer, rows, kv_heads, index[:, None, :])
    keys = keys.put(where, jnp.swapaxes(means, 1, 2))
    # The half that is growing now, and the one before it.
    growing = (end // stride - start // stride)[:, None, None, None]
    padded = jnp.pad(sums, ((0, 0), (0, 1), (0, 0), (0, 0)))
    halves = jnp.concatenate(
        (
            jnp.take_along_axis(chain, growing, axis=1),
            jnp.take_along_axis(padded, growing, axis=1),
        ),
        axis=1,
    )
    return keys._replace(halves=keys.halves.at[layer].set(jnp.swapaxes(halves, 1, 2)))
