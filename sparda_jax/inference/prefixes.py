"""Beginnings of prompts: taken from a row that has run them, put into another one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparda_jax.cache.row_blocks import put_blocks, put_index, take_blocks, take_index
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.inference.generate import GenerateState


class PrefixBlocks(NamedTuple):
    """KV blocks of one row, as the cache has them."""

    parts: Any


class PrefixIndex(NamedTuple):
    """What the selector keeps of one row's keys."""

    parts: Any


def take_prefix(
    state: GenerateState,
    row: Int[Array, ""],
    first: Int[Array, ""],
    *,
    settings: LayerSettings,
    count: int,
) -> tuple[PrefixBlocks, PrefixIndex]:
    """Blocks of a row and its whole index.

    Args:
      state: Where generation stands; it keeps its buffers.
      row: Which of its rows.
      first: The first block to take.
      settings: Of no effect: all programs of a batch have them.
      count: Blocks to take.
    """
    del settings
    cache = state.cache
    blocks = take_blocks(cache, row, first, count)
    return PrefixBlocks(blocks), PrefixIndex(take_index(cache, row))


def put_prefix_blocks(
    state: GenerateState,
    blocks: PrefixBlocks,
    row: Int[Array, ""],
    first: Int[Array, ""],
    *,
    settings: LayerSettings,
) -> GenerateState:
    """The state with such blocks in a row; `end_prefix` makes them part of it.

    Args:
      state: Where generation stands.
      blocks: Of `take_prefix`.
      row: Which of its rows.
      first: Where they begin.
      settings: Of no effect.
    """
    del settings
    return state._replace(cache=put_blocks(state.cache, blocks.parts, row, first))


def end_prefix(
    state: GenerateState,
    index: PrefixIndex,
    row: Int[Array, ""],
    length: Int[Array, ""],
    seen: Bool[Array, " V"],
    *,
    settings: LayerSettings,
) -> GenerateState:
    """The state with a row that holds `length` tokens, all of them put in.

    Args:
      state: Where generation stands.
      index: Of `take_prefix`, behind the last of them.
      row: Which of its rows.
      length: Tokens, whole blocks.
      seen: The tokens among them.
      settings: Of no effect.
    """
    del settings
    return state._replace(
        cache=put_index(state.cache, index.parts, row),
        lengths=state.lengths.at[row].set(length),
        seen=jax.lax.dynamic_update_slice_in_dim(
            state.seen, jnp.asarray(seen)[None], row, 0
        ),
    )
