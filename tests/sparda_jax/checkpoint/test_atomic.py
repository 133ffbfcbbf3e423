"""Writing files: whole or not at all, on the disk when it returns, equal for equals."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from sparda_jax.checkpoint import atomic
from sparda_jax.checkpoint.atomic import (
    new_directory,
    new_file,
    write_json,
    write_safetensors,
    write_text,
)
from sparda_jax.checkpoint.errors import CheckpointError


@pytest.fixture
def events(monkeypatch):
    """What was synchronised and moved, in order, by name."""
    found = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        found.append(("sync", pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def note_move(source, target):
        found.append(("move", pathlib.Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_move)
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, events):
    write_text(tmp_path / "a.txt", "new")
    (first, temporary), (second, moved), (third, folder) = events
    assert (first, second, third) == ("sync", "move", "sync")
    assert temporary.parent == tmp_path and temporary.name.startswith(".a.txt.")
    assert moved == tmp_path / "a.txt" and folder == tmp_path
    events.clear()
    with new_directory(tmp_path / "d") as new:
        (new / "sub").mkdir()
        (new / "sub" / "x").write_text("x")
    *synced, moved, parent = events
    assert {path.relative_to(new).as_posix() for _, path in synced} == {
        ".",
        "sub",
        "sub/x",
    }
    assert moved == ("move", tmp_path / "d") and parent == ("sync", tmp_path)


def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left"):
            write_json(path, {"new": 2})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(before) == {"old": 1}


def test_a_file_system_that_cannot_sync_directories_is_no_obstacle(
    tmp_path, monkeypatch
):
    fsync = os.fsync

    def files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "folder", tmp_path / "pipe", "/dev/null", "/dev/full"):
        with pytest.raises(CheckpointError, match="allowed: a new file, or one to"):
            write_text(name, "x")
    for name in ("a\0b", "x" * 300, "no/such/folder/x"):
        with pytest.raises(CheckpointError, match="cannot be written") as error:
            write_text(tmp_path / name, "x")
        assert "\n" not in str(error.value)
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_equal_content_gives_equal_bytes(tmp_path):
    metadata = {f"key-{n}": 'é\n\x01\x7f"\\' * n for n in range(12)}
    tensors = {f"t{n}": np.arange(n + 1.0) for n in range(5)}
    written = []
    for number in range(4):
        # The order of insertion is not content either.
        order = list(metadata.items())[:: 1 if number % 2 else -1]
        path = tmp_path / f"{number}.safetensors"
        write_safetensors(path, tensors, dict(order))
        written.append(path.read_bytes())
    assert len(set(written)) == 1
    size = int.from_bytes(written[0][:8], "little")
    assert size % 8 == 0
    found = json.loads(written[0][8 : 8 + size])["__metadata__"]
    assert found == metadata and list(found) == sorted(metadata)


def test_plain_arrays_survive(tmp_path):
    import safetensors.numpy

    path = tmp_path / "x.safetensors"
    tensors = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.ones(3)}
    write_safetensors(path, tensors, {})
    for name, array in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(array, tensors[name])
    assert atomic.cannot_write(path, ValueError("two\nlines")).args[0].count("\n") == 0
