"""How KV blocks are kept in host memory.

A codec turns blocks [..., block, 2, H] of the model's type into the arrays that are
stored, fetched and staged, one or more of them with the same leading axes, and back.
`HostStore` and everything behind it asks the codec for shapes, bytes and values; no
other file knows one. To add a host format, add a class here.
"""

import dataclasses
import math
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.commit_blocks.int8 import decoded, scale_of_each

# Float32 scales are stored by so many.
_SCALES = 256
# Of 8-bit integers: the largest magnitude that shares a scale is 127 of them.
_STEP = np.float32(1 / 127)

type Parts = tuple[Shaped[Array, "..."], ...]


@dataclasses.dataclass(frozen=True)
class BlockCodec:
    """Blocks as they are: K and V of a token side by side, in the model's type.

    A frozen value, so that it can be static in a jitted call.

    Attributes:
      exact: What is stored is decoded to what it was encoded from.
      in_slots: Device slots hold full blocks as they are stored; the growing one is
        beside them in the model's type.
    """

    exact: ClassVar[bool] = True
    in_slots: ClassVar[bool] = False

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

    def slot_shapes(
        self, block_shape: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and type of each array of a device slot, as `part_shapes`."""
        if self.in_slots:
            return self.part_shapes(block_shape, dtype)
        return (jax.ShapeDtypeStruct(block_shape, jnp.dtype(dtype)),)

    def for_slots(self, blocks: Float[Array, "*lead block two H"]) -> Parts:
        """Full blocks as slots hold them: as a fetch would bring them."""
        return self.encode(blocks) if self.in_slots else (self.stored(blocks),)

    def commit(
        self,
        slots: Parts,
        staged: Parts,
        targets: Int[Array, " J"],
        bound: Int[Array, ""] | None,
    ) -> Parts:
        """Staged blocks in their slots, in place; decoded on the way.

        Args:
          slots: All slots [R, …], an array for each of `slot_shapes`.
          staged: Fetched blocks as they are stored.
          targets: Slot of each, -1 for none.
          bound: Entries behind which all are -1.
        """
        if self.in_slots:
            return tuple(
                commit_blocks(held, part, targets, count=bound)
                for held, part in zip(slots, staged, strict=True)
            )
        (held,) = slots
        blocks, scales = self.committed(staged, held.dtype)
        return (commit_blocks(held, blocks, targets, scales=scales, count=bound),)

    def committed(self, staged: Parts, dtype: DTypeLike) -> tuple[Array, Array | None]:
        """What `commit_blocks` takes of staged blocks: blocks and their scales."""
        return self.decode(staged, dtype), None

    def stored(
        self, blocks: Float[Array, "*lead block two H"]
    ) -> Float[Array, "*lead block two H"]:
        """Blocks as they are once they have been stored and fetched again."""
        if self.exact:
            return blocks
        return self.decode(self.encode(blocks), blocks.dtype)

    def bytes_per_block(self, block_shape: tuple[int, ...], dtype: DTypeLike) -> int:
        """Bytes that one block takes in host memory and on the link."""
        shapes = self.part_shapes(block_shape, dtype)
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in shapes)


@dataclasses.dataclass(frozen=True)
class Int8Codec(BlockCodec):
    """8-bit integers: K with a scale a channel of the block, V with one a token.

    A key channel has much the same size in all tokens of a block, and a few channels
    are far larger than the others; a value has no such channels. A number x is stored
    as round(x / s), s being the largest magnitude that shares the scale over 127, so it
    is off by at most s / 2.

    Stored are the integers [block, 2, H] and the float32 scales: those of K's channels,
    those of V's tokens, then padding to the kilobyte that kernels copy at a time.

    A scale has 16 significant bits. So 127 of it is a float32 without rounding, and a
    decoded block is encoded to the same integers and scales again: its largest
    magnitude is 127 scales (rounded to 16 bits again where the model's type has fewer),
    and every other number is off by less than half a scale.
    """

    exact: ClassVar[bool] = False

    def part_shapes(
        self, block_shape: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """As `BlockCodec.part_shapes`."""
        del dtype
        block, _, dim = block_shape
        return (
            jax.ShapeDtypeStruct(block_shape, jnp.dtype(jnp.int8)),
            jax.ShapeDtypeStruct(
                (-(-(dim + block) // _SCALES) * _SCALES,), jnp.dtype(jnp.float32)
            ),
        )

    def encode(self, blocks: Float[Array, "*lead block two H"]) -> Parts:
        """As `BlockCodec.encode`."""
        *_, block, _, dim = blocks.shape
        values = blocks.astype(jnp.float32)
        size = jnp.abs(values)
        # A product: compilers make one of a division by a constant, but not always.
        k_scale = _in_16_bits(jnp.max(size[..., 0, :], axis=-2) * _STEP)
        v_scale = _in_16_bits(jnp.max(size[..., 1, :], axis=-1) * _STEP)
        scale = scale_of_each(k_scale, v_scale)
        # A scale is 0 where all that share it are, and so is the quotient then.
        quotient = values / jnp.where(scale > 0, scale, 1)
        whole = jnp.clip(jnp.round(quotient), -127, 127).astype(jnp.int8)
        padding = jnp.zeros((*v_scale.shape[:-1], -(dim + block) % _SCALES))
        return whole, jnp.concatenate((k_scale, v_scale, padding), axis=-1)

    def decode(
        self, parts: Parts, dtype: DTypeLike
    ) -> Float[Array, "*lead block two H"]:
        """As `BlockCodec.decode`."""
        whole, scales = parts
        return decoded(whole, scales, dtype)

    def committed(self, staged: Parts, dtype: DTypeLike) -> tuple[Array, Array | None]:
        """As they are stored: the kernel that commits decodes them."""
        whole, scales = staged
        return whole, scales


@dataclasses.dataclass(frozen=True)
class Int8SlotsCodec(Int8Codec):
    """`Int8Codec`, and slots hold blocks as they are stored.

    A slot takes half the device memory, decode attention reads half as much, and a
    fetched block is put there as it is.
    """

    in_slots: ClassVar[bool] = True


def _in_16_bits(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Float32 numbers of at least 0, rounded to 16 significant bits."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    rounded = (bits + jnp.uint32(0x80)) & jnp.uint32(0xFFFFFF00)
    return lax.bitcast_convert_type(rounded, jnp.float32)


_CODECS = types.MappingProxyType(
    {"exact": BlockCodec(), "int8": Int8Codec(), "int8_slots": Int8SlotsCodec()}
)


def named_codec(name: str) -> BlockCodec:
    """The codec that `CacheConfig.codec` names."""
    return _CODECS[name]
