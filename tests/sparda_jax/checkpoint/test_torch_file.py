"""Torch files, real and hostile.

`torch_forecast_tiny.pt` was written by torch 2.13 with torch.save, shaped like the
reference's training checkpoint: model_state_dict with bfloat16 Forecast tensors of 3
layers, K·H = 8, D = 16 (layer l's is arange(128) + l; q_curr is -arange(128), stored
transposed), step, sparse_config, base_model_path, AdamW and scheduler states, and the
random states of torch, Python and numpy.
"""

import io
import os
import pathlib
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.torch_file import Opaque, TorchTensor, read_torch_file

REAL = pathlib.Path(__file__).parents[2] / "goldens" / "torch_forecast_tiny.pt"


class Global:
    """Pickles as a bare GLOBAL of the given name."""

    def __init__(self, name: str):
        self.name = name


class Storage:
    """Pickles as torch's persistent id of a storage."""

    def __init__(self, kind: str, key: str, length: int):
        self.record = (kind, key, length)


class Tensor:
    """Pickles as torch's record of a tensor."""

    def __init__(self, storage: Storage, offset=0, size=(), stride=()):
        self.arguments = (storage, offset, size, stride, False, {})


class Call:
    """Pickles as a call of any name with any arguments."""

    def __init__(self, name: str, *arguments):
        self.name = name
        self.arguments = arguments


class Writer(pickle._Pickler):
    """The torch pickles of the tests: protocol 2, names without the things."""

    def save_global_name(self, obj):
        module, _, name = obj.name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.save_global_name(obj)
        elif isinstance(obj, Storage):
            kind, key, length = obj.record
            self.save(("storage", Global(kind), key, "cpu", length))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Tensor):
            self.save(Call("torch._utils._rebuild_tensor_v2", *obj.arguments))
        elif isinstance(obj, Call):
            self.save_global_name(obj)
            super().save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(value) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, 2).dump(value)
    return buffer.getvalue()


def archive(path, data: bytes, storages=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


def test_real_file():
    content = read_torch_file(REAL)
    state = content["model_state_dict"]
    grid = np.arange(128, dtype=np.float32).reshape(8, 16)
    for layer in range(3):
        name = f"module.model.layers.{layer}.self_attn.q_future_proj.weight"
        array = state[name].numpy()
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, (grid + layer).astype(array.dtype))
    current = state["module.model.layers.0.self_attn.q_curr_proj.weight"]
    assert current.strides == (1, 8)
    np.testing.assert_array_equal(current.numpy(), (-grid).astype(array.dtype))
    assert (content["step"], content["loss"]) == (2000, 0.25)
    assert content["sparse_config"]["window_size"] == 2048
    assert content["base_model_path"] == "openbmb/MiniCPM4.1-8B"
    moments = content["optimizer_state_dict"]["state"][0]["exp_avg"]
    assert moments.numpy().shape == (2, 2)
    random = content["rng_state"]
    assert random["torch"].numpy().dtype == np.uint8
    assert len(random["python"][1]) == 625
    assert isinstance(random["numpy"][1], Opaque)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("torch.FloatStorage", np.float32),
        ("torch.HalfStorage", np.float16),
        ("torch.BFloat16Storage", ml_dtypes.bfloat16),
        ("torch.DoubleStorage", np.float64),
        ("torch.LongStorage", np.int64),
    ],
)
def test_views(tmp_path, kind, dtype):
    numbers = np.arange(12).astype(dtype)
    storage = Storage(kind, "0", 12)
    content = {
        "whole": Tensor(storage, 0, (3, 4), (4, 1)),
        "turned": Tensor(storage, 0, (4, 3), (1, 4)),
        "part": Tensor(storage, 5, (2, 2), (4, 1)),
        "scalar": Tensor(storage, 11),
        "empty": Tensor(storage, 3, (0, 4), (4, 1)),
    }
    path = archive(tmp_path / "x.pt", pickled(content), {"0": numbers.tobytes()})
    found = {name: tensor.numpy() for name, tensor in read_torch_file(path).items()}
    grid = numbers.reshape(3, 4)
    np.testing.assert_array_equal(found["whole"], grid)
    np.testing.assert_array_equal(found["turned"], grid.T)
    np.testing.assert_array_equal(found["part"], [grid[1, 1:3], grid[2, 1:3]])
    assert found["scalar"].shape == () and found["scalar"] == numbers[11]
    assert found["empty"].shape == (0, 4)
    assert all(array.dtype == dtype for array in found.values())


def test_plain_data(tmp_path):
    shared = [1, 2]
    value = {
        "a": (1, -2.5, None, True, "text", ()),
        "b": [shared, shared, 2**40, -(2**70), b"bytes"[:0]],
        3: {},
    }
    value["b"].pop()
    found = read_torch_file(archive(tmp_path / "x.pt", pickled(value)))
    assert found == value
    assert found["b"][0] is found["b"][1]


class Evil:
    """What a hostile file holds: loading it makes a directory."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_hostile_reduce_is_not_executed(tmp_path, protocol):
    data = pickle.dumps({"model_state_dict": Evil(tmp_path / "made")}, protocol)
    with pytest.raises(CheckpointError, match="its pickle holds"):
        read_torch_file(archive(tmp_path / "x.pt", data))
    assert not (tmp_path / "made").exists()
    pickle.loads(data)  # It is hostile indeed.
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "builtins.getattr",
        "__builtin__.exec",
        "subprocess.Popen",
        "torch.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_tensor",
        "numpy.load",
        "functools.partial",
        "collections.OrderedDict.fromkeys",
        "runpy._run_code",
    ],
)
def test_other_names_are_refused_by_name(tmp_path, name):
    for value in (Call(name, "echo"), Global(name), {"a": [Call(name)]}):
        path = archive(tmp_path / "x.pt", pickled(value))
        with pytest.raises(CheckpointError, match="its pickle holds the name") as error:
            read_torch_file(path)
        assert name in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'id'\ntR.",
        b"(S'id'\nios\nsystem\n.",
        b"(cos\nsystem\nS'id'\no.",
        b"\x80\x02cos\nsystem\nq\0(X\2\0\0\0idtq\1Rq\2.",
        b"\x80\x04\x8c\2os\x8c\6system\x93\x8c\2id\x85R.",
        b"\x80\x02}c__builtin__\neval\n\x81.",
        b"\x82\x01.",
        b"P1\n.",
        # Reading the argument would warn.
        b"S'\\{'\n.",
        b"c\\{\nx\n.",
    ],
)
def test_opcodes_that_act_are_refused(tmp_path, data):
    with pytest.raises(CheckpointError, match="its pickle"):
        read_torch_file(archive(tmp_path / "x.pt", data))


def _floats(length=4):
    return Storage("torch.FloatStorage", "0", length)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Tensor(_floats(), 0, (5,), (1,)), "over a storage of 4 numbers"),
        (Tensor(_floats(), 1, (4,), (1,)), "over a storage of 4 numbers"),
        (Tensor(_floats(), 0, (10**12,), (0,)), "over a storage of 4 numbers"),
        (Tensor(_floats(), -1, (2,), (1,)), "size .2,."),
        (Tensor(_floats(), 0, (-2,), (1,)), "size .-2"),
        (Tensor(_floats(), 0, (2,), (-1,)), "stride .-1"),
        (Tensor(_floats(), 0, (2, 2), (1,)), "stride"),
        (Tensor(_floats(), 0, [2], [1]), "size"),
        (Tensor(_floats(), 0, (1,) * 99, (1,) * 99), "size"),
        (Tensor("x", 0, (1,), (1,)), "wanted a storage"),
        (Call("torch._utils._rebuild_tensor_v2"), "record of 0 values"),
        (Call("torch._utils._rebuild_parameter", 3), "without a tensor"),
        (Call("collections.OrderedDict", [("a", 1)]), "an OrderedDict of"),
        (Call("torch.FloatStorage", 10**12), "a call of _StorageType"),
        (Storage("torch.FloatStorage", "9", 4), "storage '9' that the archive"),
        (Storage("torch.FloatStorage", "../version", 4), "does not hold"),
        (Storage("torch.FloatStorage", "0", -4), "length -4"),
        (Storage("torch.Size", "0", 4), "a storage of type"),
        ({((), ()): 1}, "a key of type tuple"),
    ],
)
def test_lying_records(tmp_path, value, message):
    path = archive(tmp_path / "x.pt", pickled(value), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


def test_storage_of_another_size(tmp_path):
    tensor = Tensor(_floats(10**12), 0, (10**12,), (1,))
    for content in (bytes(16), bytes(17)):
        path = archive(tmp_path / "x.pt", pickled(tensor), {"0": content})
        with pytest.raises(CheckpointError, match="wanted 4000000000000"):
            read_torch_file(path).numpy()
    path = archive(
        tmp_path / "x.pt", pickled(Tensor(_floats(2), 0, (2,), (1,))), {"0": bytes(16)}
    )
    with pytest.raises(CheckpointError, match="has 16 bytes, allowed: 8"):
        read_torch_file(path).numpy()


def test_zip_bomb(tmp_path):
    path = archive(tmp_path / "x.pt", bytes(1 << 20), {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torch_file(path)
    data = pickled(Tensor(_floats(1 << 20), 0, (1 << 20,), (1,)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", bytes(1 << 22), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="data/0' is compressed"):
        read_torch_file(path).numpy()


def test_lying_zip_sizes(tmp_path):
    path = archive(tmp_path / "x.pt", pickled({"a": 1}))
    good = path.read_bytes()
    entry = good.index(b"PK\1\2")
    for size in (2**32 - 2, 2**31, 10**6):
        bad = bytearray(good)
        bad[entry + 20 : entry + 28] = struct.pack("<II", size, size)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            read_torch_file(path)
    end = good.rindex(b"PK\5\6")
    bad = bytearray(good)
    bad[end + 12 : end + 16] = struct.pack("<I", 2**31)
    path.write_bytes(bad)
    with pytest.raises(CheckpointError, match="zip directory of 2147483648 bytes"):
        read_torch_file(path)


def test_deep_and_shared_structures_take_no_time(tmp_path):
    start = time.process_time()
    doubled = b"".join(b"2\x86" for _ in range(200))
    with pytest.raises(CheckpointError, match="opcode DUP"):
        read_torch_file(archive(tmp_path / "x.pt", b"\x80\x02)" + doubled + b"."))
    # t = (t, t), two hundred times, through the memo: shared, never copied.
    doubled = b"".join(b"q\0h\0\x86" for _ in range(200))
    found = read_torch_file(archive(tmp_path / "x.pt", b"\x80\x02)" + doubled + b"."))
    assert len(found) == 2
    nested = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    assert len(read_torch_file(archive(tmp_path / "x.pt", nested))) == 1
    huge = b"\x80\x02Nr\xff\xff\xff\xff."
    assert read_torch_file(archive(tmp_path / "x.pt", huge)) is None
    assert time.process_time() - start < 10


def test_much_of_anything_takes_little(tmp_path):
    """Long pickles, each of one opcode that could cost more than its bytes."""
    size = 1 << 15
    for data in (
        b"\x80\x02" + b"N" * size + b"(t" * size + b".",
        b"\x80\x02" + b"(" * size + b"t" * size + b".",
        b"\x80\x02]" + b"(Ne" * size + b".",
        b"\x80\x02N" + b"q\0" * size + b".",
        b"\x80\x02N" + b"r\xff\xff\xff\xff" * (size // 2) + b"j\xff\xff\xff\xff.",
        b"\x80\x04" + b"N\x94" * size + b".",
        b"\x80\x04" + b"\x95\xff\xff\xff\xff\xff\xff\xff\xff." * 2,
        b"\x80\x02B\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\xff.",
    ):
        try:
            read_torch_file(archive(tmp_path / "x.pt", data))
        except CheckpointError as error:
            assert len(str(error)) < 1000


_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
    b"K\0K\4\x85K\1\x85tR"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # A state would put the offset of a tensor before its numbers.
        (_TENSOR + b"}X\6\0\0\0offsetJ\0\0\0\x80sb.", "a state of TorchTensor"),
        (_TENSOR + b"}N\x86b.", "a state of TorchTensor"),
        (_TENSOR + b")R.", "a call of TorchTensor"),
        (b"ctorch\nFloatStorage\n}b.", "a state of _StorageType"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\4\0\0\0makeNsb.", "a state of _Rec"),
        (b"ccollections\nOrderedDict\nNR.", "damaged"),
        (b"X\1\0\0\0a)R.", "damaged"),
        (b"](K\1K\2u.", "damaged"),
        (b"}K\1a.", "damaged"),
        (b"ccollections\nOrderedDict\n)R))s.", "a key of type tuple"),
        (b"}(K\1Nctorch\nSize\n)RNu.", "a key of type any"),
        (b"})q\0h\0Ns.", "a key of type tuple"),
        (b"}b.", "takes more than it has"),
        (b"(b.", "takes more than it has"),
        (b"q\0.", "takes more than it has"),
        (b"(q\0.", "takes more than it has"),
        (b"N(\x85.", "takes more than it has"),
        (b"h\7.", "an unknown memo entry 7"),
    ],
)
def test_values_of_the_file_are_closed(tmp_path, data, message):
    path = archive(tmp_path / "x.pt", b"\x80\x02" + data, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=message) as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no torch file"),
        (b"\x80\x02}.", "no torch file"),
        (b"PK\3\4" + bytes(40), "no torch file"),
    ],
)
def test_no_zip(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_torch_file(tmp_path / "none.pt")


def test_other_zips(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "x")
    with pytest.raises(CheckpointError, match="0 members named data"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled(1))
        file.writestr("a/byteorder", "big")
    with pytest.raises(CheckpointError, match="byteorder is not 'little'"):
        read_torch_file(path)


def _walk(value):
    if isinstance(value, TorchTensor):
        value.numpy()
    elif isinstance(value, dict):
        for inner in value.values():
            _walk(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _walk(inner)


def _try(folder: pathlib.Path, content: bytes) -> None:
    path = folder / "fuzz.pt"
    path.write_bytes(content)
    try:
        _walk(read_torch_file(path))
    except CheckpointError as error:
        assert len(str(error)) < 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("torch")


def test_truncation(folder):
    content = REAL.read_bytes()
    for end in range(0, len(content), 101):
        (folder / "cut.pt").write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            read_torch_file(folder / "cut.pt")


_FEW_OR_MANY = pytest.mark.parametrize(
    "examples", [100, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.long])]
)
_PLACES = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))


@_FEW_OR_MANY
def test_random_damage(folder, examples):
    content = REAL.read_bytes()

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(_PLACES, min_size=1, max_size=6))
    def check(changes):
        damaged = bytearray(content)
        for place, value in changes:
            damaged[int(place * len(damaged))] = value
        _try(folder, bytes(damaged))

    check()


@_FEW_OR_MANY
def test_random_pickles(folder, examples):
    """Damage inside the pickle, where the zip's checksum does not see it."""
    with zipfile.ZipFile(REAL) as file:
        content = file.read("torch_forecast_tiny/data.pkl")

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(_PLACES, max_size=6), st.floats(0, 1))
    def check(changes, end):
        data = bytearray(content)
        for place, value in changes:
            data[int(place * len(data))] = value
        path = archive(folder / "p.pt", bytes(data[: int(end * len(data))]))
        _try(folder, path.read_bytes())

    check()
