"""Blocks of keys and values of a call, drawn for tests, benchmarks and the tuner."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def normal(rng: np.random.Generator, *size: int) -> np.ndarray:
    """Standard normal numbers in float32."""
    return rng.standard_normal(size, dtype=np.float32)


def attended(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    head_dim: int,
    dtype: Any,
    *,
    layers: int | None,
    bias: bool,
) -> dict[str, Any]:
    """Draws the arguments that both attentions have.

    Args:
      rng: generator.
      shape: B, K, M and the keys of a block.
      head_dim: H.
      dtype: of the blocks.
      layers: length of the leading axis, of which the last layer is read; None for no
        such axis.
      bias: with a key bias.
    """
    shape = shape if layers is None else (layers, *shape)
    args = {"kv": jnp.asarray(normal(rng, *shape, 2, head_dim), dtype)}
    if layers is not None:
        args["layer"] = jnp.int32(layers - 1)
    if bias:
        args["key_bias"] = jnp.asarray(normal(rng, *shape))
    return args
