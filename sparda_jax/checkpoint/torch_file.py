"""Tensors out of a torch file (zip format), without torch and without running pickles.

A torch file holds a pickle, which is a program: loading one runs what its author wrote.
Here no unpickler is used. The few opcodes that plain data needs are interpreted below;
none of them can call anything but the records of this file. Every other opcode and
every name that is not listed is refused.

    pickle opcode           effect here
    GLOBAL                  looked up in a table of records, by name
    REDUCE                  applies a record of the table to a tuple
    BUILD                   drops the state (an OrderedDict's attributes)
    BINPERSID               a storage: type, key and length, not yet read
"""

import collections
import contextlib
import dataclasses
import functools
import io
import math
import os
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sparda_jax.checkpoint.errors import CheckpointError, show
from sparda_jax.checkpoint.files import open_regular

_MAX_PICKLE = 1 << 22  # Bytes; a 33-tensor state with its optimiser takes 50 kB.
_MAX_DIRECTORY = 1 << 23  # Bytes; torch writes about 70 a tensor.
_ZIP_TAIL = 22 + 20 + 0xFFFF  # End record, zip64 locator and the longest comment.
_MAX_DIMS = 8


@dataclasses.dataclass(frozen=True)
class _StorageType:
    """Stands for a class such as torch.FloatStorage."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers of the archive, not yet read."""

    archive: "_Archive"
    dtype: np.dtype
    key: str
    length: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
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
class Opaque:
    """A value whose contents are of no use here, such as a random state.

    Attributes:
      name: What made it.
    """

    name: str


class _Refused(Exception):
    """The pickle does what it may not do."""


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
    return collections.OrderedDict()


def _opaque(name: str) -> Callable[..., Opaque]:
    return lambda *_: Opaque(name)


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
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    table |= {name: _opaque(name) for name in _OPAQUE}
    table |= {name: _StorageType(np.dtype(kind)) for name, kind in _STORAGES.items()}
    return table


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


_MARK = object()
_PLAIN_KEYS = (str, int, float, bool, type(None))


class _Machine:
    """Interprets the data opcodes of a pickle; see the module's docstring."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._opcodes: dict[str, Callable[[Any], None]] = {
            "PROTO": self._ignore,
            "FRAME": self._ignore,
            "MARK": lambda _: self._stack.append(_MARK),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._to_mark())),
            "TUPLE1": lambda _: self._stack.append(tuple(self._take(1))),
            "TUPLE2": lambda _: self._stack.append(tuple(self._take(2))),
            "TUPLE3": lambda _: self._stack.append(tuple(self._take(3))),
            "APPEND": lambda _: self._extend(self._take(1)),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._set_items(self._take(2)),
            "SETITEMS": lambda _: self._set_items(self._to_mark()),
            "GLOBAL": self._global,
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "BINPERSID": self._persistent,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
        }
        for name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            self._opcodes[name] = self._stack.append
        for name in ("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"):
            self._opcodes[name] = self._stack.append
        for name in ("BINPUT", "LONG_BINPUT"):
            self._opcodes[name] = self._put
        for name in ("BINGET", "LONG_BINGET"):
            self._opcodes[name] = self._get

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                (value,) = self._take(1)
                return value
            action = self._opcodes.get(opcode.name)
            if action is None:
                raise _Refused(f"the pickle opcode {opcode.name}")
            action(argument)
        raise _Refused("a pickle without an end")

    def _ignore(self, _: Any) -> None:
        pass

    def _take(self, count: int) -> list[Any]:
        taken = self._stack[-count:]
        if len(taken) < count or any(value is _MARK for value in taken):
            raise _Refused("a pickle that takes more than it has")
        del self._stack[-count:]
        return taken

    def _to_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                taken = self._stack[at + 1 :]
                del self._stack[at:]
                return taken
        raise _Refused("a pickle that takes more than it has")

    def _top(self, kind: type | tuple[type, ...], what: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _Refused(f"{what} something else")
        return self._stack[-1]

    def _extend(self, values: list[Any]) -> None:
        self._top(list, "an append to").extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict, "an item of")
        if len(values) % 2:
            raise _Refused("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a tuple of tuples can take exponential time.
            if not isinstance(key, _PLAIN_KEYS):
                raise _Refused(f"a key of type {type(key).__name__}")
            target[key] = value

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        found = _globals().get(name)
        if found is None:
            raise _Refused(f"the name {show(name)}")
        self._stack.append(found)

    def _reduce(self, _: Any) -> None:
        record, arguments = self._take(2)
        if not callable(record) or not isinstance(arguments, tuple):
            raise _Refused(f"a call of {type(record).__name__}")
        self._stack.append(record(*arguments))

    def _build(self, _: Any) -> None:
        self._take(1)
        self._top((dict, Opaque), "a state of")

    def _persistent(self, _: Any) -> None:
        (record,) = self._take(1)
        if not isinstance(record, tuple) or len(record) != 5 or record[0] != "storage":
            raise _Refused(f"a persistent id {show(record)}")
        _, kind, key, _, length = record
        if not isinstance(kind, _StorageType) or not _is_count(length):
            raise _Refused(f"a storage of type {show(kind)} and length {show(length)}")
        key = self._archive.check_storage(key)
        self._stack.append(_Storage(self._archive, kind.dtype, key, length))

    def _put(self, index: int) -> None:
        if not self._stack:
            raise _Refused("a pickle that takes more than it has")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise _Refused(f"an unknown memo entry {index}")
        self._stack.append(self._memo[index])


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
        return _Machine(archive).run(data)
    except _Refused as error:
        raise CheckpointError(
            f"{path}: its pickle holds {error}, allowed: tensors, dicts, lists, tuples,"
            " strings, numbers"
        ) from error
    # What pickletools raises for opcodes that are cut off or malformed.
    except (ValueError, LookupError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path}: its pickle is damaged: {error}") from error
