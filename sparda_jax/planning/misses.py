"""How many listed blocks a step must fetch: a curve over the size of the cache.

A cache of more slots than a list has blocks is hit by blocks that come back. How often
they do is a matter of model and text, and is taken from block traces (`traces`):
`misses.json` holds the curves of those that the project publishes, and a trace of one's
own gives another. The shares are of the blocks that scores choose, by slots per such
block; forced blocks are never missed. So a curve serves other budgets than its own.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import number, require, settle, several, text
from sparda_jax.config import SparseConfig
from sparda_jax.planning.traces import BlockTrace, read_trace

# Slots per scored block that a curve is taken at. Behind the last it is level.
SIZES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_PUBLISHED = pathlib.Path(__file__).with_name("misses.json")


@dataclasses.dataclass(frozen=True)
class MissCurve:
    """Share of the scored blocks of a step that a cache misses, by its size.

    Attributes:
      sizes: Slots per scored block, ascending, the forced blocks' slots not counted.
      shares: Share that is missed at each of them.
      source: Model, text and attention that it was taken from.

    Raises:
      ConfigError: If a value is not allowed.
    """

    sizes: tuple[float, ...]
    shares: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        settle(
            self,
            sizes=several(number(above=0), "sizes"),
            shares=several(number(least=0, most=1), "shares"),
            source=text,
        )
        require(
            len(self.sizes) == len(self.shares) > 0
            and all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False)),
            "MissCurve.sizes",
            self.sizes,
            f"ascending, one for each of {len(self.shares)} shares",
        )

    def share(self, slots: int, sparse: SparseConfig) -> float:
        """Share of a list, less its own block, that a cache of `slots` misses.

        Args:
          slots: C.
          sparse: Budget and forced blocks.
        """
        forced = sparse.forced_blocks
        scored = sparse.largest_budget - forced
        if scored <= 0:
            return 0.0
        size = (slots - forced) / scored
        return (
            float(np.interp(size, self.sizes, self.shares))
            * scored
            / (sparse.largest_budget - 1)
        )


def curve_of(trace: BlockTrace) -> MissCurve:
    """A trace's curve."""
    source = f"{trace.model}, {trace.text}, {trace.attention}, {trace.length} tokens"
    found = trace.miss_curve(SIZES)
    return MissCurve(SIZES, tuple(round(float(x), 5) for x in found), source)


def trace_curve(path: str | os.PathLike) -> MissCurve:
    """The curve of a trace's file.

    Raises:
      CheckpointError: There is no such file, or it is no trace.
    """
    return curve_of(read_trace(path))


@functools.cache
def published_curve(attention: str) -> MissCurve:
    """The curve that is assumed where nothing is known of a model.

    Args:
      attention: Its own curve if there is one, else that of own queries.
    """
    held: Mapping[str, Any] = read_json(_PUBLISHED) or {}
    found = held.get(attention, held["infllm_v2"])
    return MissCurve(tuple(found["sizes"]), tuple(found["shares"]), found["source"])
