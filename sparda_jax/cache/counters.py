"""Counters that travel with generation: blocks read, and blocks fetched.

What one step or one prefill tile counts fits 32 bits. What a whole call counts may not,
and JAX has no 64-bit integers unless all of its types are 64 bits wide, so totals are
two 32-bit words: they neither wrap nor round.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Integer, UInt32


class WideCount(NamedTuple):
    """Non-negative 64-bit integers as two words.

    Attributes:
      high: Upper 32 bits.
      low: Lower 32 bits.
    """

    high: UInt32[Array, "*shape"]
    low: UInt32[Array, "*shape"]

    @staticmethod
    def zero(*shape: int) -> "WideCount":
        """Nothing counted."""
        return WideCount(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))

    @staticmethod
    def total(counts: Integer[Array, "..."]) -> "WideCount":
        """The sum of 32-bit counts, none of them negative."""
        low = counts.astype(jnp.uint32)
        zero = jnp.uint32(0)
        high, low = lax.reduce(
            (jnp.zeros_like(low), low),
            (zero, zero),
            lambda a, b: tuple(WideCount(*a).plus(WideCount(*b))),
            tuple(range(low.ndim)),
        )
        return WideCount(high, low)

    def plus(self, other: "WideCount") -> "WideCount":
        """Both together."""
        low = self.low + other.low
        carried = (low < self.low).astype(jnp.uint32)
        return WideCount(self.high + other.high + carried, low)

    def add(self, counts: Integer[Array, "*shape"]) -> "WideCount":
        """With 32-bit counts added, none of them negative."""
        low = counts.astype(jnp.uint32)
        return self.plus(WideCount(jnp.zeros_like(low), low))

    def to_numpy(self) -> np.ndarray:
        """The integers as NumPy's 64-bit ones, on the host."""
        high = np.asarray(self.high).astype(np.uint64)
        low = np.asarray(self.low).astype(np.uint64)
        return np.asarray((high << np.uint64(32)) | low)


class BlockCounts(NamedTuple):
    """KV blocks read and KV blocks present, summed over tokens, kv heads and layers."""

    attended: WideCount
    present: WideCount

    @staticmethod
    def zero() -> "BlockCounts":
        """No blocks."""
        return BlockCounts(WideCount.zero(), WideCount.zero())

    def plus(self, other: "BlockCounts") -> "BlockCounts":
        """Both together."""
        return BlockCounts(
            self.attended.plus(other.attended), self.present.plus(other.present)
        )

    def to_ints(self) -> tuple[int, int]:
        """Blocks read and blocks present, on the host."""
        return int(self.attended.to_numpy()), int(self.present.to_numpy())


class FetchCounters(NamedTuple):
    """What the block lists of one step cost, summed over rows and kv heads.

    Attributes:
      hits: Listed blocks that were in a slot.
      fetched: Listed blocks that came from the host.
      repaired: Of those, the ones that only `verify` asked for.
      recall_hits, recall_total: Blocks that the layer's own queries chose by score and
        the forecast chose as well, and all that they chose by score; counted in sampled
        steps (forced blocks are in both lists and do not count).
    """

    hits: Int[Array, "*L"]
    fetched: Int[Array, "*L"]
    repaired: Int[Array, "*L"]
    recall_hits: Int[Array, "*L"]
    recall_total: Int[Array, "*L"]

    @staticmethod
    def zero(*shape: int) -> "FetchCounters":
        """Nothing counted."""
        return FetchCounters(
            *(jnp.zeros(shape, jnp.int32) for _ in FetchCounters._fields)
        )


class FetchTotals(NamedTuple):
    """`FetchCounters` of all steps of a call, layer by layer."""

    hits: WideCount
    fetched: WideCount
    repaired: WideCount
    recall_hits: WideCount
    recall_total: WideCount

    @staticmethod
    def zero(layers: int) -> "FetchTotals":
        """Nothing counted."""
        return FetchTotals(*(WideCount.zero(layers) for _ in FetchTotals._fields))

    def add(self, step: FetchCounters) -> "FetchTotals":
        """With one step more."""
        pairs = zip(self, step, strict=True)
        return FetchTotals(*(total.add(count) for total, count in pairs))
