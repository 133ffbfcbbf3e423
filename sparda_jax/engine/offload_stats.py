"""What an offloaded generation fetched, and how well the forecast did."""

import dataclasses

import jax

from sparda_jax.cache.counters import FetchTotals, WideCount
from sparda_jax.cache.settings import OffloadSettings


@dataclasses.dataclass(frozen=True)
class OffloadStats:
    """Counters of one call's decode steps; tuples have an entry per layer.

    Attributes:
      route: How blocks were fetched.
      lookahead: Whether the layer before started the fetch.
      block_bytes: K and V of one block and kv head.
      hits_by_layer: Listed blocks that were in a device slot.
      misses_by_layer: Listed blocks that came from the host.
      repaired_by_layer: Of those, the ones that only `exactness="verify"` asked for.
      recall_hits_by_layer, recall_total_by_layer: Blocks that the layers' own queries
        chose by score and the forecast chose too, and all that they chose by score, in
        the sampled steps.
    """

    route: str
    lookahead: bool
    block_bytes: int
    hits_by_layer: tuple[int, ...]
    misses_by_layer: tuple[int, ...]
    repaired_by_layer: tuple[int, ...]
    recall_hits_by_layer: tuple[int, ...]
    recall_total_by_layer: tuple[int, ...]

    @property
    def hits(self) -> int:
        """Over all layers."""
        return sum(self.hits_by_layer)

    @property
    def misses(self) -> int:
        """Over all layers."""
        return sum(self.misses_by_layer)

    @property
    def repaired(self) -> int:
        """Over all layers."""
        return sum(self.repaired_by_layer)

    @property
    def hit_rate(self) -> float | None:
        """Hits over listed blocks; None when nothing was listed."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def fetched_bytes(self) -> int:
        """Bytes that crossed the link towards the device in decode."""
        return self.misses * self.block_bytes

    @property
    def recall(self) -> float | None:
        """Share of the own queries' scored choice that the forecast made too."""
        total = sum(self.recall_total_by_layer)
        return sum(self.recall_hits_by_layer) / total if total else None

    @property
    def recall_by_layer(self) -> tuple[float | None, ...]:
        """`recall`, layer by layer."""
        pairs = zip(self.recall_hits_by_layer, self.recall_total_by_layer, strict=True)
        return tuple(hits / total if total else None for hits, total in pairs)


def offload_stats(
    fetches: FetchTotals, offload: OffloadSettings, *, block_bytes: int
) -> OffloadStats:
    """The statistics of a call from its counters."""
    # All ten arrays come to the host at once: one by one each takes a GPU 0.4 ms.
    fetches = jax.device_get(fetches)

    def layers(counter: WideCount) -> tuple[int, ...]:
        return tuple(int(value) for value in counter.to_numpy())

    return OffloadStats(
        route=offload.route.name,
        lookahead=offload.lookahead,
        block_bytes=block_bytes,
        hits_by_layer=layers(fetches.hits),
        misses_by_layer=layers(fetches.fetched),
        repaired_by_layer=layers(fetches.repaired),
        recall_hits_by_layer=layers(fetches.recall_hits),
        recall_total_by_layer=layers(fetches.recall_total),
    )
