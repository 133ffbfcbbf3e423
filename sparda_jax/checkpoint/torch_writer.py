"""Writes state dicts as torch files, without torch: the zip form of `torch.save`.

Only what the reference's checkpoints of Forecast weights hold: dictionaries of plain
values and tensors. `torch_file` reads them, and so does `torch.load` with
`weights_only=True`.
"""

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class _Pickle:
    """Writes pickle's second protocol by hand: its module imports all that it names."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.storages: list[np.ndarray] = []

    def add(self, value: Any) -> None:
        """Writes a value."""
        if isinstance(value, np.ndarray):
            self._tensor(np.ascontiguousarray(value))
        elif isinstance(value, dict):
            self.out.write(pickle.EMPTY_DICT + pickle.MARK)
            for pair in value.items():
                for one in pair:
                    self.add(one)
            self.out.write(pickle.SETITEMS)
        elif isinstance(value, tuple):
            self.out.write(pickle.MARK)
            for one in value:
                self.add(one)
            self.out.write(pickle.TUPLE)
        elif isinstance(value, str):
            data = value.encode()
            self.out.write(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)
        elif value is None or isinstance(value, bool):
            word = {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}
            self.out.write(word[value])
        else:
            self._integer(int(value))

    def _integer(self, value: int) -> None:
        """In the two forms that torch's own careful reader takes."""
        if -(2**31) <= value < 2**31:
            self.out.write(pickle.BININT + struct.pack("<i", value))
            return
        data = pickle.encode_long(value)
        self.out.write(pickle.LONG1 + bytes([len(data)]) + data)

    def name(self, module: str, name: str) -> None:
        """Writes a name, which whoever reads it looks up."""
        self.out.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def _tensor(self, array: np.ndarray) -> None:
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.out.write(pickle.MARK + pickle.MARK)
        self.add("storage")
        self.name("torch", _STORAGES[array.dtype])
        for value in (str(len(self.storages)), "cpu", array.size):
            self.add(value)
        self.out.write(pickle.TUPLE + pickle.BINPERSID)
        strides = tuple(x // array.itemsize for x in array.strides)
        for value in (0, array.shape, strides, False):
            self.add(value)
        self.name("collections", "OrderedDict")
        self.out.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
        self.out.write(pickle.TUPLE + pickle.REDUCE)
        self.storages.append(array)

    def finished(self) -> bytes:
        """All of it."""
        return pickle.PROTO + bytes([2]) + self.out.getvalue() + pickle.STOP


def write_torch_file(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a dictionary as `torch.save` does; equal content gives equal bytes.

    Args:
      path: A new file.
      content: Strings, integers, None, tuples and dictionaries of them, and float32 or
        bfloat16 arrays, which become tensors.
    """
    pickler = _Pickle()
    pickler.add(dict(content))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:

        def put(name: str, data: bytes) -> None:
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

        put("data.pkl", pickler.finished())
        put("byteorder", b"little")
        for key, array in enumerate(pickler.storages):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            put(f"data/{key}", little.tobytes())
        put("version", b"3\n")
