"""What an offloaded generation fetched, and how well the forecast did."""

import dataclasses

import numpy as np

from sparda_jax.cache.fetch import FetchRoute
from sparda_jax.inference.layer_store import OffloadSettings, Traffic


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
      recalled_by_layer, wanted_by_layer: Blocks that the layers' own queries chose by
        score and the forecast chose too, and all that they chose by score, in the
        sampled steps.
    """

    route: FetchRoute
    lookahead: bool
    block_bytes: int
    hits_by_layer: tuple[int, ...]
    misses_by_layer: tuple[int, ...]
    repaired_by_layer: tuple[int, ...]
    recalled_by_layer: tuple[int, ...]
    wanted_by_layer: tuple[int, ...]

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
        wanted = sum(self.wanted_by_layer)
        return sum(self.recalled_by_layer) / wanted if wanted else None

    @property
    def recall_by_layer(self) -> tuple[float | None, ...]:
        """`recall`, layer by layer."""
        pairs = zip(self.recalled_by_layer, self.wanted_by_layer, strict=True)
        return tuple(got / wanted if wanted else None for got, wanted in pairs)


def offload_stats(
    traffic: Traffic, offload: OffloadSettings, *, block_bytes: int
) -> OffloadStats:
    """The statistics of a call from its counters."""

    def layers(counter: object) -> tuple[int, ...]:
        return tuple(int(value) for value in np.asarray(counter))

    return OffloadStats(
        route=offload.route,
        lookahead=offload.lookahead,
        block_bytes=block_bytes,
        hits_by_layer=layers(traffic.hits),
        misses_by_layer=layers(traffic.fetched),
        repaired_by_layer=layers(traffic.repaired),
        recalled_by_layer=layers(traffic.recalled),
        wanted_by_layer=layers(traffic.wanted),
    )
