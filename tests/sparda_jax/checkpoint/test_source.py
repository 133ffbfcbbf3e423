"""Names of models: what is a path, and what may be asked of the hub."""

import dataclasses

import pytest

from sparda_jax.checkpoint import source
from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.checkpoint.tokenizers.directory import tokenizer_from_directory
from sparda_jax.config import SparseConfig


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """Runs in an empty directory; holds the names that the hub was asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names: list[str] = []

    def download(hub_id, files):
        names.append(hub_id)
        raise CheckpointError(f"{hub_id}: asked")

    monkeypatch.setattr(source, "_download", download)
    return names


@pytest.mark.parametrize(
    "name",
    [
        "models/missing",
        "elsewhere/model.gguf",
        "elsewhere/MODEL.GGUF",
        "elsewhere/model.safetensors",
        "elsewhere/config.json",
        "./models/x",
        "../x",
        ".hidden/x",
        "~/x",
        "/nowhere/x",
        "one/two/three",
        "name",
        "org/",
        "",
        "org/na me",
        "a\0b/c",
        "x" * 5000,
        "~nobody-of-this-name/x",
        "\udcff.gguf",
        "\ud800/x",
    ],
)
def test_a_missing_local_file_is_not_asked_of_the_hub(asked, name):
    with pytest.raises(CheckpointError) as error:
        source.open_checkpoint(name)
    assert asked == []
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    message.encode()  # It can be printed.


@pytest.mark.parametrize("name", ["org/name", "Qwen/Qwen2.5-0.5B", "a/b-1.5"])
def test_hub_ids(asked, name):
    with pytest.raises(CheckpointError, match="asked"):
        source.open_checkpoint(name)
    assert asked == [name]


def test_the_shape_of_a_model_needs_no_weights(kit, monkeypatch):
    config = dataclasses.replace(kit.config, tie_embeddings=False)
    folder = kit.folder / "m"
    save_hf(folder, config, kit.tensors(config), sparse=SparseConfig())
    whole = source.read_shape(str(folder))
    opened = source.open_checkpoint(folder)
    assert whole == (opened.config, opened.sparse)
    (folder / "model.safetensors").unlink()
    alone = dataclasses.replace(whole[0], eos_ids=())
    assert source.read_shape(str(folder)) == (alone, whole[1])
    # The hub is asked for the one file alone; its cache's directories have other names.
    asked = []
    monkeypatch.setattr(source, "_download", lambda *x: asked.append(x) or folder)
    found = source.read_shape("org/name")
    assert found == (dataclasses.replace(alone, name="org/name"), whole[1])
    assert asked == [("org/name", ["config.json"])]


def test_a_name_with_bytes_that_are_not_utf8(kit, saved):
    """The path is taken as it is; what is shown of it is text."""
    named = saved.rename(saved.with_name("caf\udce9"))
    kit.edit_json(named / "config.json", lambda values: values.pop("_name_or_path"))
    assert open_checkpoint(named).config.name == "caf\ufffd"
    metadata = kit.metadata(kit.config) | {"general.name": None}
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    path = kit.write_gguf(metadata, tensors)
    path = path.rename(path.with_name("\udcff.gguf"))
    assert open_checkpoint(path).config.name == "\ufffd"


def test_the_shape_of_a_gguf_file(kit):
    file = kit.tiny_gguf()
    assert source.read_shape(str(file)) == (source.open_checkpoint(file).config, None)
    assert source.read_shape(str(kit.folder / "missing")) is None


def test_a_tokenizer_that_is_not_supported_leaves_the_ids(kit):
    """The model opens, with its end tokens, and says why there is no tokenizer."""
    changes = {"tokenizer.ggml.pre": "unheard-of"}
    path = kit.write_gguf(
        kit.metadata(kit.config) | changes,
        kit.gguf_tensors(kit.config, kit.tensors(kit.config), True),
    )
    source = open_checkpoint(path)
    assert source.tokenizer is None
    assert source.config.eos_ids == (2, 0)
    assert "ggml.pre = 'unheard-of', allowed: one of smollm" in source.tokenizer_error


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_another_tokenizer_file_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsupportedTokenizer, match=f"holds {name} but no tokenizer.js"):
        tokenizer_from_directory(tmp_path, {})
