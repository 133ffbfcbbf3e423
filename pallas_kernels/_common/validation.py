"""Argument checks. Each raises ValueError that names the argument and the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def require_shape(name: str, x: Any, shape: Sequence[int | None], axes: str) -> None:
    """Checks ``x.shape`` against ``shape``; ``None`` stands for any size.

    Args:
      name: the argument's name, for the message.
      x: anything with a ``shape``.
      shape: the wanted sizes.
      axes: the wanted axes in letters, for the message ("B N H").

    Raises:
      ValueError: when the rank or a size differs.
    """
    got = tuple(x.shape)
    if len(got) != len(shape) or any(
        want is not None and want != size
        for want, size in zip(shape, got, strict=False)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {got}; it must be [{axes}] = ({wanted})")


def require_rows(name: str, x: Any, axes: str) -> None:
    """Checks that ``x`` has rows of something.

    Args:
      name: the argument's name, for the message.
      x: the array.
      axes: how its shape is written, for the message.

    Raises:
      ValueError: with fewer than two axes, or an empty one.
    """
    if x.ndim < 2 or min(x.shape) < 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be {axes} with at least two "
            "axes, none of them empty"
        )


def require_float(name: str, x: Any) -> None:
    """Checks that ``x`` is float32, bfloat16 or float16.

    Raises:
      ValueError: for any other dtype.
    """
    if jnp.dtype(x.dtype).name not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: {FLOAT_DTYPES}")


def require_dtype(name: str, x: Any, dtype: Any) -> None:
    """Checks that ``x`` has exactly ``dtype``.

    Raises:
      ValueError: for any other dtype.
    """
    if jnp.dtype(x.dtype) != jnp.dtype(dtype):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {jnp.dtype(dtype)}")


def require_integer(name: str, x: Any) -> None:
    """Checks that ``x`` holds signed integers.

    Raises:
      ValueError: for any other dtype.
    """
    if not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be a signed integer")


def require_groups(query_heads: int, kv_heads: int) -> int:
    """Returns G = N / K.

    Raises:
      ValueError: when the query heads do not split evenly over the kv heads.
    """
    if kv_heads < 1 or query_heads < 1 or query_heads % kv_heads:
        raise ValueError(
            f"q has {query_heads} heads and kv has {kv_heads}; the query heads must "
            "be a positive multiple of the kv heads"
        )
    return query_heads // kv_heads


def require_scale(scale: float | None, head_dim: int) -> float:
    """Returns the logit scale, ``head_dim ** -0.5`` by default.

    Raises:
      ValueError: when ``scale`` is not a finite Python number.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"scale is {scale!r}; it must be a Python float or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    return float(scale)


def require_positive(name: str, value: int) -> int:
    """Returns ``value`` when it is an int of at least 1.

    Raises:
      ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
    return value


def require_non_negative(name: str, value: int) -> int:
    """Returns ``value`` when it is an int of at least 0.

    Raises:
      ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 0")
    return value


def attended(
    q: Float[Array, "*rows N H"],
    kv: Float[Array, "*L B K M block 2 H"] | Int8[Array, "*L B K M block 2 H"],
    layer: Int[Array, ""] | int | None,
    key_bias: Float[Array, "*L B K M block"] | None,
    scale: float | None,
    *,
    in_8_bits: bool = False,
) -> dict[str, Any]:
    """Checks what both attentions read, with or without a layer axis.

    Adding an axis of 1 is free, whereas slicing a layer out of the stack would copy
    it; the kernels therefore always take the stack and a layer index.

    Args:
      q: queries, the batch B first.
      kv: blocks of keys (index 0 of the axis of 2) and values (index 1).
      layer: index into the leading axis; None when ``kv`` has no such axis.
      key_bias: what is added to the scaled logits of a key, or None.
      scale: factor of the logits, or None for the default.
      in_8_bits: ``kv`` holds integers, whose scales the caller checks.

    Returns:
      The fields of ``operands.Attended``, the leading axis present.

    Raises:
      ValueError: on a wrong rank or dtype, an axis of 2 that is not one, a missing or
        superfluous ``layer``, heads that do not divide, or a bias that does not fit.
    """
    require_float("q", q)
    batch, heads, head_dim = q.shape[0], *q.shape[-2:]
    scale = require_scale(scale, head_dim)
    rank = 6 if layer is None else 7
    axes = "B K C block 2 H" if layer is None else "L B K C block 2 H"
    if kv.ndim != rank or kv.shape[-2] != 2 or min(kv.shape) < 1:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)} with layer={layer!r}; it must be [{axes}] "
            "with no empty axis (pass layer exactly when kv has the leading L axis)"
        )
    if not in_8_bits:
        require_float("kv", kv)
    if key_bias is not None:
        require_shape("key_bias", key_bias, kv.shape[:-2], axes.removesuffix(" 2 H"))
        require_dtype("key_bias", key_bias, jnp.float32)
    if layer is None:
        kv = kv[None]
        key_bias = None if key_bias is None else key_bias[None]
    layer = layer_index(layer, kv.shape[0])
    require_groups(heads, kv.shape[2])
    size = (None, batch, None, None, None, 2, head_dim)
    require_shape("kv", kv, size, "L B K C block 2 H")
    require_dtype("kv", kv, jnp.int8 if in_8_bits else q.dtype)
    return {"kv": kv, "layer": layer, "key_bias": key_bias, "scale": scale}


def layer_index(layer: Int[Array, ""] | int | None, layers: int) -> Int[Array, ""]:
    """An index into a stack of layers as int32; 0 for the only one if None.

    Raises:
      ValueError: for a number that is outside, or what is no scalar integer.
    """
    if layer is None:
        layer = 0
    elif isinstance(layer, int):
        if not 0 <= layer < layers:
            raise ValueError(f"layer is {layer}; allowed: 0 .. {layers - 1}")
    else:
        require_integer("layer", layer)
        require_shape("layer", layer, (), "")
    return jnp.asarray(layer, jnp.int32)


def listed(indices: Int[Array, " J"], count: Int[Array, ""] | None) -> dict[str, Any]:
    """Checks a list of rows.

    Args:
      indices: rows, negative for none.
      count: how many entries are looked at, or None.

    Returns:
      The fields of ``operands.Listed``.

    Raises:
      ValueError: on other shapes or dtypes.
    """
    require_shape("indices", indices, (None,), "J")
    require_integer("indices", indices)
    if count is not None:
        require_shape("count", count, (), "")
        require_integer("count", count)
        count = count.astype(jnp.int32)
    return {"indices": indices.astype(jnp.int32), "count": count}
