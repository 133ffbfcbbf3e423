"""Numerical conventions that every implementation follows.

Scores, softmax and accumulators are float32. A masked logit is -inf, chosen with
``where`` and never by adding or multiplying, so that NaN and inf in keys nobody may
read cannot reach a result. A row that may read no key has output 0 and
log-sum-exp -inf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NEG_INF = float("-inf")
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def in_32_bit[**A, R](f: Callable[A, R]) -> Callable[A, R]:
    """Runs ``f`` with 64-bit types off, whatever the caller's setting.

    Indices and accumulators are 32-bit by design; with ``jax_enable_x64`` every
    ``arange`` and ``zeros`` would silently become 64-bit instead.
    """

    @functools.wraps(f)
    def wrapped(*args: A.args, **kwargs: A.kwargs) -> R:
        with jax.enable_x64(False):
            return f(*args, **kwargs)

    return wrapped


def dot_precision(dtype: jnp.dtype) -> lax.Precision:
    """Full float32 products for float32 operands, which GPUs would do in TF32."""
    if jnp.dtype(dtype) == jnp.float32:
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """Two-operand einsum with float32 accumulation and result."""
    return jnp.einsum(
        spec,
        a,
        b,
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def finite_or_zero(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Replaces -inf by 0: the shift of a softmax row that has no key."""
    return jnp.where(x == NEG_INF, 0.0, x)


def softmax_finish(
    acc: Float[Array, "*S H"], total: Float[Array, "*S"], top: Float[Array, "*S"]
) -> tuple[Float[Array, "*S H"], Float[Array, "*S"]]:
    """Turns running sums into the output and the log-sum-exp.

    Args:
      acc: sum of exp(logit - top) * value, float32.
      total: sum of exp(logit - top), float32; 0 for a row without keys.
      top: the row's largest logit, float32; -inf for a row without keys.

    Returns:
      The attention output (0 for a row without keys) and its log-sum-exp (-inf).
    """
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = acc / total[..., None]
    return out, jnp.where(empty, NEG_INF, top + jnp.log(total))


@overload
def cdiv(a: int, b: int) -> int: ...


@overload
def cdiv(a: jax.Array, b: int) -> jax.Array: ...


def cdiv(a: int | jax.Array, b: int) -> int | jax.Array:
    """Division rounded up, for non-negative ``a``."""
    return (a + b - 1) // b
