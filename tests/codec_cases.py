"""Host formats that only tests know: each is one class."""

import jax
import jax.numpy as jnp
from jax import lax

from sparda_jax.cache.codecs import BlockCodec


class Float16(BlockCodec):
    """Half the bytes of float32, and half its digits."""

    def part_shapes(self, block_shape, dtype):
        return (jax.ShapeDtypeStruct(block_shape, jnp.float16),)

    def encode(self, blocks):
        return (blocks.astype(jnp.float16),)


class Halves(BlockCodec):
    """float32 in two arrays of 16 bits: nothing is lost."""

    def part_shapes(self, block_shape, dtype):
        assert dtype == jnp.float32
        return (jax.ShapeDtypeStruct(block_shape, jnp.uint16),) * 2

    def encode(self, blocks):
        bits = lax.bitcast_convert_type(blocks, jnp.uint32)
        return (bits >> 16).astype(jnp.uint16), bits.astype(jnp.uint16)

    def decode(self, parts, dtype):
        high, low = (part.astype(jnp.uint32) for part in parts)
        return lax.bitcast_convert_type((high << 16) | low, jnp.float32).astype(dtype)
