"""KV blocks in host memory: their layout, bytes, reading, writing and growing.

Each stored array of the codec is [Lo, B, K, M, *part]: layer, row, kv head, block. All
of them live in pinned memory (`cache.memory`) and are only sliced, updated by slices
and read by kernels (`cache.lint`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from sparda_jax.cache.codecs import BlockCodec, Parts
from sparda_jax.cache.memory import (
    host_shape,
    host_sharding,
    host_zeros,
    to_device,
    to_host,
)
from sparda_jax.cache.routes import FetchRoute

# Blocks of one row and head that are moved at a time, where many are.
CHUNK_BLOCKS = 64
# Blocks that prefill writes at a time where it does so by slices.
_PIECES = (CHUNK_BLOCKS, 8, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostStore:
    """All blocks of the offloaded layers.

    Attributes:
      parts: The codec's arrays, each [Lo, B, K, M, *part], in host memory; only their
        types in an abstract store.
      block_shape: Of a decoded block: (block, 2, H).
      dtype: Of a decoded block.
      codec: How blocks are stored.
    """

    parts: tuple[Any, ...]
    block_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    codec: BlockCodec = dataclasses.field(metadata={"static": True})

    @staticmethod
    def empty(
        lead: tuple[int, int, int, int],
        block_shape: tuple[int, ...],
        dtype: DTypeLike,
        codec: BlockCodec,
        *,
        abstract: bool = False,
    ) -> "HostStore":
        """A store of zeros.

        Args:
          lead: Layers, rows, kv heads and blocks.
          block_shape: Of a block: (block, 2, H).
          dtype: The model's type.
          codec: How blocks are stored.
          abstract: Types only, to lower without allocating.

        Raises:
          ConfigError: If there is no host memory kind.
        """
        make = jax.ShapeDtypeStruct if abstract else host_zeros
        parts = tuple(
            make((*lead, *part.shape), part.dtype)
            for part in codec.part_shapes(block_shape, dtype)
        )
        return HostStore(parts, block_shape, jnp.dtype(dtype), codec)

    @property
    def lead(self) -> tuple[int, int, int, int]:
        """Layers, rows, kv heads and blocks of a row and head."""
        layers, batch, heads, blocks, *_ = self.parts[0].shape
        return layers, batch, heads, blocks

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, in the store and on the link."""
        return self.codec.bytes_per_block(self.block_shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store."""
        layers, batch, heads, blocks = self.lead
        return layers * batch * heads * blocks * self.bytes_per_block

    def host_shapes(self) -> "HostStore":
        """The store's types, to lower programs without allocating it."""
        parts = tuple(host_shape(part.shape, part.dtype) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    def flat(self) -> tuple[Shaped[Array, "R *part"], ...]:
        """The arrays with one axis of blocks, as fetch routes read them."""
        return tuple(part.reshape(-1, *part.shape[4:]) for part in self.parts)

    def staging(self, entries: int) -> Parts:
        """A device buffer for that many fetched blocks."""
        return tuple(
            jnp.zeros((entries, *part.shape[4:]), part.dtype) for part in self.parts
        )

    def read(
        self,
        layer: int | Int[Array, ""],
        first: int | Int[Array, ""],
        count: int,
        *,
        row: int | Int[Array, ""] | None = None,
    ) -> Float[Array, "1 B K M block 2 H"]:
        """Blocks first … first + count − 1 of a layer, on the device.

        Of every row, or of one (then B is 1).
        """
        _, batch, heads, _ = self.lead
        rows = batch if row is None else 1

        def piece(part: Array) -> Array:
            rest = part.shape[4:]
            at = (layer, 0 if row is None else row, 0, first, *(0,) * len(rest))
            sizes = (1, rows, heads, count, *rest)
            return to_device(lax.dynamic_slice(part, at, sizes))

        pieces = (piece(part) for part in self.parts)
        return self.codec.decode(tuple(pieces), self.dtype)

    def write(
        self,
        blocks: Float[Array, "Lo B K M block 2 H"],
        *,
        layer: int | Int[Array, ""] = 0,
        row: int | Int[Array, ""] = 0,
        block: int | Int[Array, ""] = 0,
    ) -> "HostStore":
        """With device blocks put at a layer, row and block, in place."""
        pieces = self.codec.encode(blocks)
        parts = (
            lax.dynamic_update_slice(
                part,
                to_host(piece.astype(part.dtype)),
                (layer, row, 0, block, *(0,) * (part.ndim - 4)),
            )
            for part, piece in zip(self.parts, pieces, strict=True)
        )
        return dataclasses.replace(self, parts=tuple(parts))

    def put_new(
        self,
        kv: Float[Array, "1 R K M block 2 H"],
        first: Int[Array, " R"],
        end: Int[Array, " R"],
        *,
        layer: int | Int[Array, ""],
        row: Int[Array, ""],
        route: FetchRoute | None,
    ) -> "HostStore":
        """With blocks first … end − 1 of some rows of a layer.

        No other block is written: one that is stored is never encoded again. By one
        kernel where the route has it, nothing is to be encoded and layers are unrolled
        (in a scan it was not tried on a GPU): slices reach a fifth of the link's rate
        there. Else row by row, in pieces of several sizes, so that they end where the
        blocks do.

        Args:
          kv: All blocks of R neighbouring rows, on the device.
          first, end: Which of them to write, per row.
          layer: Where to.
          row: The first of the rows.
          route: How blocks are fetched, and written where it can.
        """
        by_kernel = route is not None and route.writes and isinstance(layer, int)
        if route is not None and by_kernel and self.codec.exact:
            return self._put_by_kernel(kv, first, end, layer, row, route)

        def put_row(number: Array, store: HostStore) -> HostStore:
            done = first[number]
            for size in _PIECES:
                if size > kv.shape[3]:
                    continue

                def put(step: Array, store: HostStore, size=size, done=done):
                    block = done + step * size
                    where = (0, number, 0, block, 0, 0, 0)
                    sizes = (1, 1, kv.shape[2], size, *kv.shape[4:])
                    piece = lax.dynamic_slice(kv, where, sizes)
                    return store.write(
                        piece, layer=layer, row=row + number, block=block
                    )

                pieces = jnp.maximum(end[number] - done, 0) // size
                store = lax.fori_loop(0, pieces, put, store)
                done += pieces * size
            return store

        if kv.shape[1] == 1:
            return put_row(jnp.int32(0), self)
        return lax.fori_loop(0, kv.shape[1], put_row, self)

    def _put_by_kernel(self, kv, first, end, layer, row, route) -> "HostStore":
        """`put_new` where one kernel does it."""
        _, batch, heads, blocks = self.lead
        block = jnp.arange(blocks)
        fresh = (block >= first[:, None]) & (block < end[:, None])  # R M
        number = layer * batch + row + jnp.arange(kv.shape[1])
        head = number[:, None] * heads + jnp.arange(heads)
        place = jnp.where(fresh[:, None], head[..., None] * blocks + block, -1)
        pairs = zip(self.flat(), self.codec.encode(kv), strict=True)
        written = (
            route.write(held, new.reshape(-1, *held.shape[1:]), place.reshape(-1))
            for held, new in pairs
        )
        parts = (
            new.reshape(part.shape)
            for part, new in zip(self.parts, written, strict=True)
        )
        return dataclasses.replace(self, parts=tuple(parts))

    def grow(self, blocks: int) -> "HostStore":
        """A store with more blocks a row and head.

        Beside the old arrays and the new ones there is only a chunk on the device.
        """
        parts = []
        for part in self.parts:
            shape = (*part.shape[:3], blocks, *part.shape[4:])
            parts.append(copy_into(host_zeros(shape, part.dtype), part))
        return dataclasses.replace(self, parts=tuple(parts))

    def take_row(self, row: int | Int[Array, ""]) -> "HostStore":
        """A store of a copy of one row."""
        parts = (
            copy_into(
                host_zeros((part.shape[0], 1, *part.shape[2:]), part.dtype),
                part,
                from_row=row,
            )
            for part in self.parts
        )
        return dataclasses.replace(self, parts=tuple(parts))

    def put_row(self, one: "HostStore", row: int | Int[Array, ""]) -> "HostStore":
        """The store, in the same buffers, with the row of another one in its place."""
        pairs = zip(self.parts, one.parts, strict=True)
        parts = (copy_into(all_rows, part, to_row=row) for all_rows, part in pairs)
        return dataclasses.replace(self, parts=tuple(parts))

    def copy_rows(self, rows: Sequence[int]) -> "HostStore":
        """A store of copies of some rows."""
        # An index by a list copies; on a CPU the new array may go on using that memory.
        return self.with_numpy(
            tuple(np.asarray(part)[:, list(rows)] for part in self.parts)
        )

    def to_numpy(self) -> tuple[np.ndarray, ...]:
        """Copies of the arrays that NumPy can write to."""
        return tuple(np.array(part) for part in self.parts)

    def with_numpy(self, arrays: tuple[np.ndarray, ...]) -> "HostStore":
        """The store with NumPy's arrays in it."""
        parts = tuple(jax.device_put(array, host_sharding()) for array in arrays)
        return dataclasses.replace(self, parts=parts)


@functools.partial(jax.jit, donate_argnums=0)
def copy_into(
    new: Shaped[Array, "Lo B K N *part"],
    old: Shaped[Array, "Lo R K M *part"],
    *,
    to_row: int | Int[Array, ""] = 0,
    from_row: int | Int[Array, ""] = 0,
) -> Shaped[Array, "Lo B K N *part"]:
    """The new array with the old one's blocks in front, chunk by chunk.

    Of all rows where both have as many, else of one.
    """
    layers, _, heads, blocks, *rest = old.shape
    rows = min(old.shape[1], new.shape[1])
    chunk = min(CHUNK_BLOCKS, blocks)
    chunks = -(-blocks // chunk)

    def copy(number: Array, new: Array) -> Array:
        layer, index = number // chunks, number % chunks
        first = jnp.minimum(index * chunk, blocks - chunk)
        at = (layer, from_row, 0, first, *(0,) * len(rest))
        piece = lax.dynamic_slice(old, at, (1, rows, heads, chunk, *rest))
        at = (layer, to_row, 0, first, *(0,) * len(rest))
        return lax.dynamic_update_slice(new, to_host(to_device(piece)), at)

    return lax.fori_loop(0, layers * chunks, copy, new)
