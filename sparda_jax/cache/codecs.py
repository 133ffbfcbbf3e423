"""How KV blocks are kept in host memory.

A codec turns blocks [..., block, 2, H] of the model's type into the arrays that are
stored, fetched and staged, one or more of them with the same leading axes, and back.
`HostStore` and everything behind it asks the codec for shapes, bytes and values; no
other file knows one. To add a host format, add a class here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

type Parts = tuple[Shaped[Array, "..."], ...]


@dataclasses.dataclass(frozen=True)
class BlockCodec:
    """Blocks as they are: K and V of a token side by side, in the model's type.

    A frozen value, so that it can be static in a jitted call.
    """

    def part_shapes(
        self, block_shape: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and type of each stored array for one block of that shape and type."""
        return (jax.ShapeDtypeStruct(block_shape, jnp.dtype(dtype)),)

    def encode(self, blocks: Float[Array, "*lead block two H"]) -> Parts:
        """Blocks as they are stored; runs on the device."""
        return (blocks,)

    def decode(
        self, parts: Parts, dtype: DTypeLike
    ) -> Float[Array, "*lead block two H"]:
        """Stored blocks in the model's type; runs on the device."""
        return parts[0].astype(dtype)

    def bytes_per_block(self, block_shape: tuple[int, ...], dtype: DTypeLike) -> int:
        """Bytes that one block takes in host memory and on the link."""
        shapes = self.part_shapes(block_shape, dtype)
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in shapes)
