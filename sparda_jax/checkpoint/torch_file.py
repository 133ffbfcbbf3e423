"""Tensors out of a torch file (zip format), without torch and without running pickles.

A torch file holds a pickle, which is a program: loading one runs what its author wrote.
Here it is first looked through: only the opcodes that plain data needs are let in, and
only keys that are quickly hashed. Then an unpickler reads it that is closed: a name
stands for one of the records of this file, or the file is refused; a persistent id is a
storage of the archive, not yet read.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import open_regular
from sparda_jax.checks import one_line

_MAX_PICKLE = 1 << 22  # Bytes; a 33-tensor state with its optimiser takes 50 kB.
_MAX_DIRECTORY = 1 << 23  # Bytes; torch writes about 70 a tensor.
_ZIP_TAIL = 22 + 20 + 0xFFFF  # End record, zip64 locator and the longest comment.
_MAX_DIMS = 8


class _Refused(Exception):
    """The pickle does what it may not do."""


class _Closed:
    """What a pickle holds, and may neither call nor change."""

    def __call__(self, *_: Any) -> Any:
        raise _Refused(f"a call of {type(self).__name__}")

    def __setstate__(self, _: object) -> None:
        raise _Refused(f"a state of {type(self).__name__}")


@dataclasses.dataclass(frozen=True)
class _StorageType(_Closed):
    """Stands for a class such as torch.FloatStorage."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage(_Closed):
    """Numbers of the archive, not yet read."""

    archive: "_Archive"
    dtype: np.dtype
    key: str
    length: int


@dataclasses.dataclass(frozen=True)
class TorchTensor(_Closed):
    """A tensor of the file, read when `numpy` is called.

    Attributes:
      shape: Its shape.
      strides: Elements from one index to the next, per dimension.
      offset: Elements of the storage before the first one.
    """

    storage: _Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """Type of the numbers."""
        return self.storage.dtype

    def numpy(self) -> np.ndarray:
        """Reads the tensor into a new array.

        Raises:
          CheckpointError: The archive does not hold the numbers.
        """
        flat = self.storage.archive.read_storage(self.storage)
        itemsize = flat.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :],
            self.shape,
            tuple(step * itemsize for step in self.strides),
            writeable=False,
        )
        return view.copy()


@dataclasses.dataclass(frozen=True)
class Opaque(_Closed):
    """A value whose contents are of no use here, such as a random state.

    Attributes:
      name: What made it.
    """

    name: str

    def __setstate__(self, _: object) -> None:
        """Drops the contents."""


class _Dict(collections.OrderedDict):
    """An OrderedDict without attributes of its own."""

    def __setstate__(self, _: object) -> None:
        """Drops them."""


@dataclasses.dataclass(frozen=True)
class _Record(_Closed):
    """Stands for a function of torch or numpy: makes what it would have made."""

    make: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rebuild_tensor(*arguments: Any) -> TorchTensor:
    """torch._utils._rebuild_tensor_v2: storage, offset, size, stride and the rest."""
    if len(arguments) < 4:
        raise _Refused(f"a tensor record of {len(arguments)} values, wanted 6")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage):
        raise _Refused(f"a tensor over {show(storage)}, wanted a storage")
    plain = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not plain or len(shape) != len(strides) or len(shape) > _MAX_DIMS:
        raise _Refused(f"a tensor of size {show(shape)} and stride {show(strides)}")
    if not all(map(_is_count, (offset, *shape, *strides))):
        raise _Refused(f"a tensor of size {show(shape)} and stride {show(strides)}")
    count = math.prod(shape)
    steps = zip(shape, strides, strict=True)
    last = offset + sum((size - 1) * step for size, step in steps)
    # Steps of 0 could repeat few numbers endlessly: no more elements than are stored.
    if count and (last >= storage.length or count > storage.length):
        raise _Refused(
            f"a tensor of size {show(shape)}, stride {show(strides)} and offset "
            f"{offset} over a storage of {storage.length} numbers"
        )
    if not count:
        offset = 0
    return TorchTensor(storage, shape, strides, offset)


def _rebuild_parameter(*arguments: Any) -> Any:
    """torch._utils._rebuild_parameter: its tensor."""
    if not arguments or not isinstance(arguments[0], TorchTensor):
        raise _Refused("a parameter without a tensor")
    return arguments[0]


def _ordered_dict(*arguments: Any) -> dict:
    """collections.OrderedDict, which is pickled empty and filled afterwards."""
    if arguments not in ((), ([],), ({},)):
        raise _Refused(f"an OrderedDict of {show(arguments)}, wanted an empty one")
    return _Dict()


def _opaque(name: str) -> _Record:
    return _Record(lambda *_: Opaque(name))


# Random states and the like, which lie beside the weights in a training checkpoint.
_OPAQUE = (
    "torch.Size",
    "torch.device",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
_STORAGES: Mapping[str, Any] = {
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.DoubleStorage": np.float64,
    "torch.ByteStorage": np.uint8,
    "torch.CharStorage": np.int8,
    "torch.ShortStorage": np.int16,
    "torch.IntStorage": np.int32,
    "torch.LongStorage": np.int64,
    "torch.BoolStorage": np.uint8,
}


@functools.cache
def _globals() -> dict[str, Any]:
    table: dict[str, Any] = {
        "collections.OrderedDict": _Record(_ordered_dict),
        "torch._utils._rebuild_tensor_v2": _Record(_rebuild_tensor),
        "torch._utils._rebuild_parameter": _Record(_rebuild_parameter),
    }
    table |= {name: _opaque(name) for name in _OPAQUE}
    table |= {name: _StorageType(np.dtype(kind)) for name, kind in _STORAGES.items()}
    return table


def _find(name: str) -> Any:
    """The record that a name of a pickle stands for."""
    found = _globals().get(name)
    if found is None:
        raise _Refused(f"the name {show(name)}")
    return found


@contextlib.contextmanager
def _zip_errors(path: pathlib.Path) -> Generator[None]:
    """Turns what zipfile raises for a damaged archive into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        LookupError,
        OverflowError,
        RuntimeError,  # Encrypted, or of a version or method that is not known.
        ValueError,
        struct.error,
    ) as error:
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read: {error.strerror}"
        else:
            reason = (
                f"is no torch file in zip format (torch.save since 1.6), or it is "
                f"damaged: {error}"
            )
        raise CheckpointError(f"{path}: {reason}") from error


def _check_directory(path: pathlib.Path) -> None:
    """Refuses a central directory that zipfile would take long and much memory for."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - _ZIP_TAIL, 0)
        file.seek(start)
        tail = file.read(_ZIP_TAIL)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + 22 > len(tail):
            raise zipfile.BadZipFile("no end of central directory")
        length = int.from_bytes(tail[at + 12 : at + 16], "little")
        locator = tail[max(at - 20, 0) : at]
        if locator.startswith(b"PK\x06\x07"):
            file.seek(min(int.from_bytes(locator[8:16], "little"), size))
            length = max(length % 0xFFFFFFFF, _directory_length(file.read(56)))
    if length > _MAX_DIRECTORY:
        raise CheckpointError(
            f"{path}: zip directory of {length} bytes, allowed: {_MAX_DIRECTORY}"
        )


def _directory_length(record: bytes) -> int:
    """Size of the central directory by the zip64 end record."""
    return int.from_bytes(record[40:48], "little")


class _Archive:
    """The zip file around the pickle; torch stores its members uncompressed."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with _zip_errors(path):
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
        roots = [n for n in self._members if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(roots) != 1:
            raise CheckpointError(
                f"{path}: {len(roots)} members named data.pkl, wanted one: it is not a "
                "file of torch.save"
            )
        self._root = roots[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in self._members and self.read(order, 16) != b"little":
            raise CheckpointError(f"{path}: {order} is not 'little', nothing else is")

    def pickle(self) -> bytes:
        """The pickled structure."""
        return self.read(self._root + "data.pkl", _MAX_PICKLE)

    def read(self, name: str, longest: int) -> bytes:
        """One member, of at most `longest` bytes."""
        info = self._members.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: member {show(name)} is missing")
        if info.compress_type != zipfile.ZIP_STORED or (
            info.compress_size != info.file_size
        ):
            raise CheckpointError(
                f"{self.path}: member {show(name)} is compressed, allowed: stored, as "
                "torch.save does"
            )
        if info.file_size > longest:
            raise CheckpointError(
                f"{self.path}: member {show(name)} has {info.file_size} bytes, "
                f"allowed: {longest}"
            )
        if info.header_offset + info.file_size > os.path.getsize(self.path):
            raise CheckpointError(
                f"{self.path}: member {show(name)} of {info.file_size} bytes goes past "
                "the end of the file"
            )
        with _zip_errors(self.path), zipfile.ZipFile(self.path) as archive:
            return archive.read(name)

    def read_storage(self, storage: _Storage) -> np.ndarray:
        """[length] numbers."""
        name = f"{self._root}data/{storage.key}"
        wanted = storage.length * storage.dtype.itemsize
        raw = self.read(name, wanted)
        if len(raw) != wanted:
            raise CheckpointError(
                f"{self.path}: member {show(name)} has {len(raw)} bytes, wanted "
                f"{wanted}: {storage.length} numbers of type {storage.dtype.name}"
            )
        return np.frombuffer(raw, storage.dtype)

    def check_storage(self, key: object) -> str:
        """The key of a storage, if the archive has it."""
        if not isinstance(key, str) or f"{self._root}data/{key}" not in self._members:
            raise _Refused(f"a storage {show(key)} that the archive does not hold")
        return key


# What plain data needs; none of these can make memory that the pickle does not fill.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS GLOBAL "
    "REDUCE BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
_BY_CODE = {found.code: found for found in pickletools.opcodes}
_KEYS = frozenset(("int", "int_or_bool", "bool", "float", "str", "None"))
_SHORT = "a pickle that takes more than it has"


def _opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """Opcodes and their arguments; those of a refused one are not looked at."""
    stream = io.BytesIO(data)
    while code := stream.read(1):
        opcode = _BY_CODE.get(code.decode("latin-1"))
        name = f"{code!r}" if opcode is None else opcode.name
        if opcode is None or name not in _OPCODES:
            raise _Refused(f"the pickle opcode {name}")
        argument = None
        if name == "GLOBAL":
            # `pickletools` would take escapes in it for what they mean.
            lines = (stream.readline().decode().rstrip("\n") for _ in range(2))
            _find(".".join(lines))
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode, argument
        if name == "STOP":
            return
    raise _Refused("a pickle without an end")


def _check_opcodes(data: bytes) -> None:
    """Refuses opcodes that are not data, and keys that are not plain.

    What an opcode takes and leaves is `pickletools`' own table. Of a value only its
    type is followed: hashing a tuple of tuples can take exponential time, so what is a
    key must be known.
    """
    stack: list[str] = []
    marks: list[int] = []
    memo: dict[int, str] = {}
    for opcode, argument in _opcodes(data):
        name, takes = opcode.name, [found.name for found in opcode.stack_before]
        if name == "MARK":
            marks.append(len(stack))
            stack.append("mark")
            continue
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if not stack or stack[-1] == "mark":
                raise _Refused(_SHORT)
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        first = len(stack) - len(takes)
        if "mark" in takes:
            # What stands before the mark, a dict or a list, is taken as well.
            first = marks.pop() - takes.index("mark") if marks else -1
        if first < 0 or (marks and first <= marks[-1]):
            raise _Refused(_SHORT)
        keys: list[str] = []
        if name == "SETITEM":
            keys = [stack[first + 1]]
        elif name == "SETITEMS":
            keys = stack[first + 2 :: 2]
        for kind in keys:
            if kind not in _KEYS:
                raise _Refused(f"a key of type {kind}")
        del stack[first:]
        if name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise _Refused(f"an unknown memo entry {argument}")
            stack.append(memo[argument])
        else:
            stack += [found.name for found in opcode.stack_after]


class _Unpickler(pickle.Unpickler):
    """Knows the records of this file by name, and the archive's storages."""

    def __init__(self, data: bytes, archive: _Archive) -> None:
        # Unused places in the memo go, and the others are numbered from 0 on: the
        # unpickler makes a list as long as the largest number.
        super().__init__(io.BytesIO(pickletools.optimize(data)), fix_imports=False)
        self._archive = archive

    def find_class(self, module: str, name: str, /) -> Any:
        return _find(f"{module}.{name}")

    def persistent_load(self, pid: Any, /) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise _Refused(f"a persistent id {show(pid)}")
        _, kind, key, _, length = pid
        if not isinstance(kind, _StorageType) or not _is_count(length):
            raise _Refused(f"a storage of type {show(kind)} and length {show(length)}")
        key = self._archive.check_storage(key)
        return _Storage(self._archive, kind.dtype, key, length)


def read_torch_file(path: str | os.PathLike) -> Any:
    """Reads the structure of a torch file; tensors stay in the file.

    Args:
      path: A file of torch.save, in the zip format.

    Returns:
      What was saved: dicts, lists, tuples, str, int, float, bool, None, `TorchTensor`
      in the place of tensors and `Opaque` in the place of random states.

    Raises:
      CheckpointError: It is no such file, is damaged, or holds anything else; nothing
        of it is ever executed.
    """
    archive = _Archive(pathlib.Path(path))
    data = archive.pickle()
    try:
        _check_opcodes(data)
        return _Unpickler(data, archive).load()
    except _Refused as error:
        raise CheckpointError(
            f"{path}: its pickle holds {error}, allowed: tensors, dicts, lists, tuples,"
            " strings, numbers"
        ) from error
    # What pickletools and pickle raise for opcodes that are cut off, malformed, or meet
    # values of another type than they are for.
    except (
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{path}: its pickle is damaged: {one_line(str(error), 200)}"
        ) from error
