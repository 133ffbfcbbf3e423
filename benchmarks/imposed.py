"""Block lists that benchmarks impose: shared by neighbours, or of a trace.

Whoever is told what to list still scores and chooses as ever, so that a prefill costs
what it costs; only what attention then reads is another. Importing this imports JAX.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.traced import TracedLists, map_trace, traced_scores
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.planning.traces import read_trace
from sparda_jax.sparse.selectors import Selector, get_selector


def agreeing_lists(real: Array, agree: int) -> Array:
    """Lists of which `agree` neighbouring tokens share one: that of the first of them.

    Args:
      real: The lists that were really made, [B, K, T, P].
      agree: Tokens of a group, all of which lie in one block.
    """
    shared = jnp.repeat(real[:, :, ::agree], agree, axis=2)
    return shared[:, :, : real.shape[2]]


def _agreeing(base: Selector, agree: int) -> Selector:
    """A selector that chooses as `base` does and lists by groups."""

    @dataclasses.dataclass(frozen=True)
    class Agreeing(type(base)):
        name = base.name

        agree: int = 1

        def select(self, tile, config, sparse, implementation=None):
            real = super().select(tile, config, sparse, implementation)
            if real is None or tile.decoding:
                return real
            return agreeing_lists(real, self.agree)

    return Agreeing(agree)


# Tokens of the trace that a row's lists are ahead of those of the row before it.
_ROWS_APART = 131


def imposing(base: Selector, lists: TracedLists, *, decode: bool = False) -> Selector:
    """A selector that scores as `base` does and chooses what a trace chose.

    Args:
      base: The selector to run.
      lists: A trace's lists, mapped (`benchmarks.traced.map_trace`).
      decode: Also in decode, whichever row of how many is run: all rows take the lists
        of the first, each at a place of its own.
    """

    @dataclasses.dataclass(frozen=True)
    class Imposing(type(base)):
        name = base.name

        def score(self, tile, config, sparse, implementation):
            real = super().score(tile, config, sparse, implementation)
            if tile.decoding and not decode:
                return real
            bits, at = jnp.asarray(lists.bits)[tile.layer], tile.positions
            if decode:
                bits = jnp.repeat(bits[:1], real.shape[0], axis=0)
                at += _ROWS_APART * jnp.arange(real.shape[0])[:, None]
            imposed = traced_scores(
                bits[: real.shape[0]],
                lists.places,
                at % lists.tokens,
                tile.positions[0, 0] // sparse.block_size,
                real.shape[-1],
                sparse,
                steady=False,
            )
            # What is real decides nothing, but the compiler cannot know that.
            return jnp.where(real > 1e30, real, imposed)

    return Imposing()


def selector_with(
    attention: str, agree: int | None, lists: TracedLists | None
) -> Selector:
    """The selector of an attention, with imposed lists."""
    found = get_selector(attention)
    if found.dense:
        return found
    if lists is not None:
        return imposing(found, lists)
    return found if agree in (None, 1) else _agreeing(found, agree)


def lists_of(
    path: pathlib.Path | None, config: ModelConfig, sparse: SparseConfig, rows: int
) -> TracedLists | None:
    """A trace's lists for the benchmark's shape, or None."""
    if path is None:
        return None
    return map_trace(
        read_trace(path),
        layers=config.num_layers,
        rows=rows,
        kv_heads=config.num_kv_heads,
        scored=sparse.largest_budget - sparse.forced_blocks,
    )
