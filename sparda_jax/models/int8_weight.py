"""Linear weights with a copy in 8-bit integers, which short products on a CPU read.

A decode step on a CPU takes as long as it takes to read the weights. XLA's CPU back end
reads narrow ones no faster: it widens the whole matrix into memory first, which costs
five times the float32 product (docs/log-cpu.md). Widened block by block, each small
enough to stay in cache, they cost about half of it. A prefill gains nothing that way
and loses half of its speed, so it goes on reading the full weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Numbers that are widened at a time: half a megabyte of float32.
_BLOCK = 128 * 1024
# A product of more rows costs so much more than reading that integers gain nothing.
MOST_ROWS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A linear weight, and integers with a scale an output that stand for it.

    Number x of an output is stored as round(x / s), s being the largest magnitude of
    that output's weights over 127, so it is off by at most s / 2.

    Attributes:
      full: [D, E], inputs before outputs; None where all products read integers.
      values: int8 [E, D], outputs before inputs.
      scale: [E] float32.
    """

    full: Any
    values: Any
    scale: Any

    def __getitem__(self, key: Any) -> "Int8Weight":
        """All of it, `[...]`, or some outputs, `[..., some]`, as of an array [D, E]."""
        if key is Ellipsis:
            return self
        _, outputs = key
        full = None if self.full is None else self.full[key]
        return Int8Weight(full, self.values[outputs], self.scale[outputs])

    def product(self, x: Float[Array, "rows D"]) -> Float[Array, "rows E"]:
        """x · weight in x's dtype."""
        if self.full is not None and x.shape[0] > MOST_ROWS:
            return x @ self.full.astype(x.dtype)
        outputs, inputs = self.values.shape
        size = min(outputs, max(1, _BLOCK // inputs))

        def block(number: Array, product: Array) -> Array:
            # The last block begins early, so that it ends where the outputs do.
            first = jnp.minimum(number * size, outputs - size)
            part = lax.dynamic_slice_in_dim(self.values, first, size)
            part = _widened_product(part, x)
            return lax.dynamic_update_slice_in_dim(product, part, first, 0)

        room = jnp.zeros((outputs, x.shape[0]), x.dtype)
        return self._scaled(lax.fori_loop(0, -(-outputs // size), block, room))

    def _scaled(self, product: Float[Array, "E rows"]) -> Float[Array, "rows E"]:
        return (product * self.scale.astype(product.dtype)[:, None]).T


def _widened_product(
    values: Int[Array, "E D"], x: Float[Array, "rows D"]
) -> Float[Array, "E rows"]:
    return lax.dot_general(values.astype(x.dtype), x, (((1,), (1,)), ((), ())))


@jax.jit
def rounded(
    weight: Float[Array, "E D"],
) -> tuple[Int[Array, "E D"], Float[Array, " E"]]:
    """Integers of a weight [out, in], and their scales."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=1) / 127
    # A scale is 0 where all weights of the output are, and so is the quotient then.
    quotient = weight / jnp.where(scale > 0, scale, 1)[:, None]
    return jnp.round(quotient).astype(jnp.int8), scale


def int8_weight(weight: Float[Array, "D E"]) -> Int8Weight:
    """A weight with its copy in integers."""
    return Int8Weight(weight, *rounded(weight.T))


def as_array(weight: Float[Array, "D E"] | Int8Weight) -> Float[Array, "D E"]:
    """A linear weight as an array, however it is kept."""
    if not isinstance(weight, Int8Weight):
        return weight
    assert weight.full is not None
    return weight.full
