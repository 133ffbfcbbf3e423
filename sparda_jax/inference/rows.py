"""Single rows of a running batch: run in their place, emptied, taken out, put in.

Every function here is a program of fixed shapes whatever the row and its lengths are,
so that rows come and go without a compilation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.cache.rows import put_row as put_cache_row
from sparda_jax.cache.rows import reset_row as reset_cache_row
from sparda_jax.cache.rows import take_row as take_cache_row
from sparda_jax.cache.settings import LayerSettings
from sparda_jax.config import ConfigError
from sparda_jax.inference.generate import (
    WITHOUT_ROWS,
    GenerateState,
    Prompt,
    Request,
    decode_loop,
    prefill_with_hidden,
)
from sparda_jax.inference.logprobs import TokenLogs, prompt_logs
from sparda_jax.models.decoder import Decoder

_WITH_ROWS = sorted(set(GenerateState._fields) - {"cache", *WITHOUT_ROWS})


def _each(
    change: Callable[..., Array], state: GenerateState, *others: GenerateState
) -> GenerateState:
    """The state with every array that has an axis of rows changed, but the cache."""
    changed: dict[str, Any] = {
        name: jax.tree.map(
            change, getattr(state, name), *(getattr(x, name) for x in others)
        )
        for name in _WITH_ROWS
    }
    return state._replace(**changed)


def at_row(state: GenerateState, row: Int[Array, ""]) -> GenerateState:
    """The state as if it had that row alone; the cache is not copied."""
    one = _each(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), state)
    return one._replace(cache=state.cache._replace(row=row))


def with_row(
    state: GenerateState, one: GenerateState, row: Int[Array, ""]
) -> GenerateState:
    """The state with what was made of `at_row` in its place."""

    def put(new: Array, old: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)

    all_rows = _each(put, one, state)
    return all_rows._replace(cache=one.cache._replace(row=None))


def prefill_row_and_sample(
    model: Decoder,
    state: GenerateState,
    prompt: Prompt,
    request: Request,
    row: Int[Array, ""],
    *,
    settings: LayerSettings,
    tile_size: int,
) -> GenerateState:
    """`prefill_and_sample` of one row in its place; no other row is touched.

    Scratch is that of a batch of one.

    Args:
      model: The decoder.
      state: Where generation stands, of all rows.
      prompt: New tokens of the row [1, T].
      request: Sampling and limits of the row: its arrays have one entry.
      row: The row.
      settings: The model and how to attend.
      tile_size: Query tokens per prefill tile.
    """
    one, _ = _prefill_one(model, state, prompt, request, row, settings, tile_size)
    return with_row(state, one, row)


def _prefill_one(model, state, prompt, request, row, settings, tile_size):
    """The row's state and its prompt's hidden states; arguments as above."""
    one = at_row(state, row)
    return prefill_with_hidden(
        model, one, prompt, request, settings=settings, tile_size=tile_size
    )


def prefill_row_and_score(
    model: Decoder,
    state: GenerateState,
    prompt: Prompt,
    request: Request,
    row: Int[Array, ""],
    following: Int[Array, " T"],
    *,
    settings: LayerSettings,
    tile_size: int,
) -> tuple[GenerateState, TokenLogs]:
    """`prefill_row_and_sample`, and the logs of the token behind each of the prompt's.

    Args:
      model, state, prompt, request, row, settings, tile_size: As there; the state has
        room for logs.
      following: The token behind each of the prompt's.
    """
    assert state.logs is not None
    one, hidden = _prefill_one(model, state, prompt, request, row, settings, tile_size)
    logs = prompt_logs(model, hidden[0], following, state.logs.top.shape[-1])
    return with_row(state, one, row), logs


prefill_row_and_sample_call = jax.jit(
    prefill_row_and_sample,
    static_argnames=("settings", "tile_size"),
    donate_argnames="state",
)


def decode_row_loop(
    model: Decoder,
    state: GenerateState,
    request: Request,
    row: Int[Array, ""],
    *,
    settings: LayerSettings,
) -> GenerateState:
    """`decode_loop` of one row in its place: no other row is computed or touched.

    Args:
      model: The decoder.
      state: Where generation stands, of all rows.
      request: Sampling and limits of the row: its arrays have one entry.
      row: The row.
      settings: The model and how to attend.
    """
    one, before = at_row(state, row), state.cache
    if isinstance(before, OffloadCache):
        # What lies in a staging buffer means nothing between two calls.
        areas = tuple(
            before.store.staging(area[0].shape[0] // before.rows)
            for area in before.staging
        )
        one = one._replace(cache=one.cache._replace(staging=areas))  # pyrefly: ignore
    one = decode_loop(model, one, request, settings=settings)
    state = with_row(state, one, row)
    if isinstance(before, OffloadCache):
        cache = state.cache._replace(staging=before.staging)  # pyrefly: ignore
        state = state._replace(cache=cache)
    return state


decode_row_loop_call = jax.jit(
    decode_row_loop, static_argnames="settings", donate_argnames="state"
)


def reset_row(
    state: GenerateState, row: Int[Array, ""], *, settings: LayerSettings
) -> GenerateState:
    """The state with one row as a new state has it: empty, and done.

    Args:
      state: Where generation stands.
      row: The row that leaves.
      settings: The model and what its selector keeps.
    """
    one = _each(lambda x: jnp.zeros_like(x[:1]), state)
    one = one._replace(tokens=one.tokens - 1, done=~one.done)
    cache = reset_cache_row(state.cache, row, settings.sparse, settings.indices)
    return with_row(state, one._replace(cache=cache), row)


def take_row(state: GenerateState, row: int) -> GenerateState:
    """A state of a copy of one row, in buffers of its own.

    Args:
      state: Where generation stands; it keeps its buffers.
      row: Which of its rows.
    """
    at = jax.device_put(jnp.int32(row))
    one = _each(lambda x: _take_entry(x, at), state)
    copies: dict[str, Any] = {
        name: jax.tree.map(jnp.copy, getattr(one, name)) for name in WITHOUT_ROWS
    }
    return one._replace(cache=take_cache_row(state.cache, row), **copies)


def put_row(state: GenerateState, one: GenerateState, row: int) -> GenerateState:
    """The state with a row as `take_row` gives it put in place of one of its own.

    Args:
      state: Where generation stands; its buffers are used up.
      one: A state of one row, of the same sizes; it keeps its buffers.
      row: Which row to replace.

    Raises:
      ConfigError: If the row has other sizes than the state's own.
    """
    room = (state.tokens.shape[1], one.tokens.shape[1])
    if room[0] != room[1]:
        raise ConfigError(
            f"the row has room for {room[1]} output tokens: it must be {room[0]}, as "
            "the rows that it joins have"
        )
    cache = put_cache_row(state.cache, one.cache, row)
    at = jax.device_put(jnp.int32(row))
    changed = _each(lambda old, new: _put_entry(old, new, at), state, one)
    return changed._replace(cache=cache)


@jax.jit
def _take_entry(x: Array, row: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, 1)


@functools.partial(jax.jit, donate_argnums=0)
def _put_entry(x: Array, new: Array, row: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, row, 0)
