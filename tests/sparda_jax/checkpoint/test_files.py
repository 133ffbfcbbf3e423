import json
import os
import threading

import pytest
from patience import PATIENCE

from sparda_jax.checkpoint import files
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.forecast import load_forecast
from sparda_jax.checkpoint.gguf_header import read_header
from sparda_jax.checkpoint.hf import read_directory, read_safetensors
from sparda_jax.checkpoint.tokenizers.directory import tokenizer_from_directory
from sparda_jax.models.presets import get_preset


def _sparse_file(path, size):
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def test_what_is_there(tmp_path):
    path = tmp_path / "é.json"
    path.write_text('{"a": ["é", "\\ud83d\\ude00"]}', encoding="utf-8")
    assert files.read_json(path) == {"a": ["é", "😀"]}
    assert files.read_text(path, 100).startswith('{"a"')
    assert files.is_file(path) and not files.is_file(tmp_path)
    for missing in (tmp_path / "no", path / "below"):
        assert files.read_json(missing) is None
        assert files.read_text(missing, 1) is None
        assert not files.is_file(missing)
        with pytest.raises(FileNotFoundError):
            files.open_regular(missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 100, "100 bytes, allowed: at most 99"),
        (b'{"a": "\xff"}', "no valid JSON"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\uDFFF": [1]}', "lone surrogate"),
        (b"[1]", "wanted a JSON object"),
        (b'{"a": 1', "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        files.read_json(path, 99 if len(content) == 100 else 10_000)
    assert "x.json" in str(error.value) and "\n" not in str(error.value)
    str(error.value).encode()


def test_deep_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a":' * 200_000)
    with pytest.raises(CheckpointError, match="no valid JSON"):
        files.read_json(path)


READERS = {
    "tokenizer.json": lambda path: tokenizer_from_directory(path.parent, {}),
    "chat_template.jinja": lambda path: tokenizer_from_directory(path.parent, {}),
    "tokenizer_config.json": lambda path: tokenizer_from_directory(path.parent, {}),
    "config.json": lambda path: read_directory(path.parent),
    "model.safetensors": read_safetensors,
    "model.gguf": read_header,
    "forecast.pt": lambda path: load_forecast(
        path, config=get_preset("smollm2-135m").model, fingerprint=None, sparse=None
    ),
    "prompt.txt": files.read_text,
}


def _with_tokenizer(path):
    if path.name in ("chat_template.jinja", "tokenizer_config.json"):
        content = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
        (path.parent / "tokenizer.json").write_text(content)


@pytest.mark.parametrize("name", READERS)
def test_pipe_and_device_are_no_files(tmp_path, name):
    """Opening a pipe waits for a writer, and a device never ends."""
    path = tmp_path / name
    _with_tokenizer(path)
    made = [lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir]
    for make in made:
        make()
        failures = []

        def read(failures=failures):
            try:
                READERS[name](path)
                failures.append(None)
            except CheckpointError as error:
                failures.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert failures, "it waits"
        # A tokenizer is asked for by `is_file`: what is none is not there.
        if name != "tokenizer.json":
            assert "regular file" in str(failures[0])
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "name", [n for n in READERS if "." in n and n != "forecast.pt"]
)
def test_size_is_asked_first(tmp_path, name):
    """3 GiB of zeros take no memory and no time."""
    path = _sparse_file(tmp_path / name, 3 << 30)
    _with_tokenizer(path)
    with pytest.raises(CheckpointError) as error:
        READERS[name](path)
    assert name in str(error.value) and len(str(error.value)) < 500


def test_names_that_no_file_has(kit):
    directory = kit.folder
    (directory / "config.json").write_text("{}")
    index = {"weight_map": {"model.norm.weight": "a" * 300 + ".safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_directory(directory)
    for name in ("a" * 300, "a\0b"):
        for read in (files.is_file, files.open_regular, files.read_json):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read(directory / name)


def test_growing_file_is_bounded(tmp_path):
    """Files of /proc say that they have no bytes."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    with pytest.raises(CheckpointError, match="over 10 bytes"):
        files.read_bytes("/proc/self/maps", 10)


def test_a_pipe_is_read_where_pipes_are_taken(tmp_path):
    """A shell's `<(command)` is one; whoever never writes leaves it empty."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(b"ein Text")
    try:
        assert files.read_text(f"/dev/fd/{reader}", pipes=True) == "ein Text"
    finally:
        os.close(reader)
    os.mkfifo(tmp_path / "nobody")
    assert files.read_text(tmp_path / "nobody", pipes=True) == ""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(b"123456789")
    try:
        with pytest.raises(CheckpointError, match="at most 8"):
            files.read_text(f"/dev/fd/{reader}", 8, pipes=True)
    finally:
        os.close(reader)
