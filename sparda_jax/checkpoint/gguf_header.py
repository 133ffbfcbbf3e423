"""The header of a GGUF file, read without believing it.

`gguf.GGUFReader` trusts counts, lengths and offsets, and takes four seconds for a
vocabulary of 49,000 tokens. This reader checks every number against the bytes that are
left before it uses it, and takes a tenth of a second. Types and block sizes are the
`gguf` package's.

Layout: magic, version, tensor count, key count; the keys; the tensors' names, shapes,
types and offsets; padding; the tensors' data.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import open_regular

_VERSIONS = (2, 3)
_MAX_KEY = 65535  # GGUF's own limit.
_MAX_ELEMENTS = 1 << 23  # Array elements of the whole header; 150k tokens use 600k.
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_Value = gguf.GGUFValueType
_NUMBERS: Mapping[int, np.dtype] = {
    _Value.UINT8: np.dtype("<u1"),
    _Value.INT8: np.dtype("<i1"),
    _Value.UINT16: np.dtype("<u2"),
    _Value.INT16: np.dtype("<i2"),
    _Value.UINT32: np.dtype("<u4"),
    _Value.INT32: np.dtype("<i4"),
    _Value.FLOAT32: np.dtype("<f4"),
    _Value.BOOL: np.dtype("?"),
    _Value.UINT64: np.dtype("<u8"),
    _Value.INT64: np.dtype("<i8"),
    _Value.FLOAT64: np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
      shape: Outermost dimension first: [out, in] for linears.
      kind: Format of its data.
      offset: Bytes from the start of the file.
      nbytes: Size of its data.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """All that a GGUF file says before its data.

    Attributes:
      path: The file.
      metadata: Values by key: str, int, float, bool, list of str, or numpy array.
      tensors: Tensors by GGUF name.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """Reads forward through a buffer, never past its end."""

    def __init__(self, path: pathlib.Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0
        self._elements = 0

    def fail(self, field: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: GGUF {field} = {show(value)} at byte {self.position}, "
            f"allowed: {allowed}"
        )

    def take(self, field: str, count: int) -> int:
        """Moves over `count` bytes and returns where they start."""
        start = self.position
        if count > self.size - start:
            raise CheckpointError(
                f"{self.path}: GGUF {field} needs {count} bytes at byte {start}, but "
                f"the file ends at {self.size}: it is truncated or damaged"
            )
        self.position = start + count
        return start

    def u32(self, field: str) -> int:
        return _U32.unpack_from(self.buffer, self.take(field, 4))[0]

    def u64(self, field: str) -> int:
        return _U64.unpack_from(self.buffer, self.take(field, 8))[0]

    def text(self, field: str, longest: int | None = None) -> str:
        length = self.u64(f"length of {field}")
        if longest is not None and length > longest:
            raise self.fail(f"length of {field}", length, f"at most {longest}")
        start = self.take(field, length)
        return self._decode(field, self.buffer[start : start + length])

    def _decode(self, field: str, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(field, raw, "UTF-8") from error

    def texts(self, field: str, count: int) -> list[str]:
        """`count` strings; this loop is most of the time of opening a file."""
        buffer, size, unpack = self.buffer, self.size, _U64.unpack_from
        position, out = self.position, []
        for _ in range(count):
            if position + 8 > size:
                break
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                break
            try:
                out.append(buffer[start:position].decode())
            except UnicodeDecodeError as error:
                self.position = start
                raise self.fail(field, buffer[start:position], "UTF-8") from error
        if len(out) < count:
            raise CheckpointError(
                f"{self.path}: GGUF {field}: string {len(out)} of {count} goes past "
                f"the end of the file at {size}: it is truncated or damaged"
            )
        self.position = position
        return out

    def value(self, field: str) -> Any:
        kind = self.u32(f"type of {field}")
        if kind == _Value.STRING:
            return self.text(field)
        if kind == _Value.ARRAY:
            return self._array(field)
        if kind not in _NUMBERS:
            raise self.fail(f"type of {field}", kind, "a value type of GGUF (0 to 12)")
        return self._numbers(field, kind, 1)[0].item()

    def _array(self, field: str) -> Any:
        kind = self.u32(f"element type of {field}")
        count = self.u64(f"element count of {field}")
        smallest = 8 if kind == _Value.STRING else 1
        if kind in _NUMBERS:
            smallest = _NUMBERS[kind].itemsize
        elif kind != _Value.STRING:
            raise self.fail(
                f"element type of {field}", kind, "a number, bool or string type"
            )
        left = self.size - self.position
        if count * smallest > left:
            raise self.fail(
                f"element count of {field}",
                count,
                f"at most {left // smallest}, which is where the file ends",
            )
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise self.fail(
                f"element count of {field}",
                count,
                f"at most {_MAX_ELEMENTS} array elements in the header",
            )
        if kind == _Value.STRING:
            return self.texts(field, count)
        return self._numbers(field, kind, count)

    def _numbers(self, field: str, kind: int, count: int) -> np.ndarray:
        dtype = _NUMBERS[kind]
        start = self.take(field, count * dtype.itemsize)
        if dtype == np.bool_:  # Bytes other than 0 and 1 are no valid numpy bools.
            raw = np.frombuffer(self.buffer, np.uint8, count, start)
            return raw != 0
        return np.frombuffer(self.buffer, dtype, count, start).copy()


def _read_tensor(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """One entry; its offset is still relative to the data."""
    name = cursor.text("tensor name", _MAX_KEY)
    dims = cursor.u32(f"dimensions of {show(name)}")
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.fail(f"dimensions of {show(name)}", dims, f"1 to {_MAX_DIMS}")
    shape = tuple(cursor.u64(f"shape of {show(name)}") for _ in range(dims))[::-1]
    if min(shape) < 1:
        raise cursor.fail(f"shape of {show(name)}", shape, "positive sizes")
    number = cursor.u32(f"type of {show(name)}")
    try:
        kind = gguf.GGMLQuantizationType(number)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise cursor.fail(
            f"type of {show(name)}", number, "a tensor type that `gguf` knows"
        ) from error
    if shape[-1] % per_block:
        raise cursor.fail(
            f"shape of {show(name)}",
            shape,
            f"rows of a multiple of {per_block} elements for {kind.name}",
        )
    offset = cursor.u64(f"offset of {show(name)}")
    nbytes = math.prod(shape) // per_block * block_bytes
    return name, TensorInfo(shape, kind, offset, nbytes)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    ok = isinstance(value, int) and 0 < value <= _MAX_ALIGNMENT
    if not ok or value & (value - 1):
        raise cursor.fail(
            "general.alignment", value, f"a power of two up to {_MAX_ALIGNMENT}"
        )
    return value


def _place(
    cursor: _Cursor, tensors: Mapping[str, TensorInfo], alignment: int
) -> dict[str, TensorInfo]:
    """Makes offsets absolute and checks that the data lies in the file, apart."""
    base = -(-cursor.position // alignment) * alignment
    placed, end, previous = {}, base, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        offset = base + info.offset
        if offset % alignment:
            raise cursor.fail(
                f"offset of {show(name)}", info.offset, f"a multiple of {alignment}"
            )
        if offset < end:
            raise cursor.fail(
                f"offset of {show(name)}",
                info.offset,
                f"{end - base} or more, where {show(previous)} ends",
            )
        end, previous = offset + info.nbytes, name
        if end > cursor.size:
            raise CheckpointError(
                f"{cursor.path}: GGUF tensor {show(name)} of shape {list(info.shape)} "
                f"ends at byte {end}, but the file ends at {cursor.size}: it is "
                "truncated or damaged"
            )
        placed[name] = dataclasses.replace(info, offset=offset)
    return placed


def _parse(cursor: _Cursor) -> GGUFHeader:
    magic = cursor.u32("magic")
    if magic != gguf.GGUF_MAGIC:
        raise cursor.fail("magic", magic.to_bytes(4, "little"), "b'GGUF'")
    version = cursor.u32("version")
    if version not in _VERSIONS:
        raise cursor.fail("version", version, f"little-endian, one of {_VERSIONS}")
    tensor_count = cursor.u64("tensor count")
    key_count = cursor.u64("key count")
    # The least bytes: a tensor 32 (name, dimension, type, offset), a key 13.
    left = cursor.size - cursor.position
    if tensor_count * 32 + key_count * 13 > left:
        raise cursor.fail(
            "tensor count, key count",
            (tensor_count, key_count),
            f"what fits into the {left} bytes that follow",
        )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("key", _MAX_KEY)
        if key in metadata:
            raise cursor.fail("key", key, "each key once")
        metadata[key] = cursor.value(show(key))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name, info = _read_tensor(cursor)
        if name in tensors:
            raise cursor.fail("tensor name", name, "each name once")
        tensors[name] = info
    placed = _place(cursor, tensors, _alignment(cursor, metadata))
    return GGUFHeader(cursor.path, metadata, placed)


def read_header(path: str | os.PathLike) -> GGUFHeader:
    """Reads and checks the header of a GGUF file, versions 2 and 3, little-endian.

    Args:
      path: The file.

    Returns:
      The header; every tensor in it lies wholly in the file and overlaps no other.

    Raises:
      CheckpointError: The file cannot be read, is no such file, or is damaged.
    """
    path = pathlib.Path(path)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: the file is empty, wanted a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _parse(_Cursor(path, buffer))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
