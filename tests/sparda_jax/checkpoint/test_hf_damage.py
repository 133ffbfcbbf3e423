"""Damaged and random safetensors directories: CheckpointError, or a model."""

import json
import pathlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.models import spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda map_: map_.update({"x": "../other.safetensors"}), "a file beside it"),
        (lambda map_: map_.update({"x": "/etc/passwd"}), "a file beside it"),
        (lambda map_: map_.update({"x": 5}), "a file beside it"),
        (lambda map_: map_.update({"x": "none.safetensors"}), "is missing; .* wants 1"),
        (
            lambda map_: map_.update({"x": "model-00001-of-00002.safetensors"}),
            "tensor 'x' is missing",
        ),
        (lambda map_: map_.clear(), "weight_map = {}"),
        (lambda map_: map_.pop(spec.FINAL_NORM), "model.norm.weight .* is missing"),
    ],
)
def test_damaged_index(kit, change, message):
    save_hf(kit.folder / "m", kit.config, kit.tensors(kit.config), shard_bytes=60_000)
    index = kit.folder / "m" / "model.safetensors.index.json"
    kit.edit_json(index, lambda values: change(values["weight_map"]))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(kit.folder / "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "safetensors"),
        (struct.pack("<Q", 2**62) + b"{}", "safetensors"),
        (struct.pack("<Q", 90_000_000) + b"{}", "safetensors"),
        (struct.pack("<Q", 2) + b"[]", "safetensors"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "safetensors"),
    ],
)
def test_damaged_header(saved, content, message):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
        {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        3,
    ],
)
def test_lying_entries(saved, entry):
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(20)
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(saved)


@pytest.fixture(scope="module")
def intact(session_kit) -> tuple[pathlib.Path, bytes]:
    folder = session_kit.folder / "fuzz"
    if not folder.exists():
        save_hf(folder, session_kit.config, session_kit.tensors(session_kit.config))
    return folder, (folder / "model.safetensors").read_bytes()


def _try(folder: pathlib.Path, content: bytes) -> bool:
    (folder / "model.safetensors").write_bytes(content)
    try:
        open_checkpoint(folder).load(workers=1)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return False
    return True


def test_truncation(intact):
    folder, content = intact
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header, 13), *range(header, len(content), 7001)]
    assert _try(folder, content)
    for place in [*places, len(content) - 1]:
        assert not _try(folder, content[:place])
    assert not _try(folder, content + b"\0")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_random_damage(intact, changes):
    folder, content = intact
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * header)] = value
    _try(folder, bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
    st.data(),
)
def test_random_config_values(session_kit, intact, value, data):
    """Any JSON in any field: CheckpointError, or a model."""
    folder, content = intact
    path = folder / "config.json"
    original = path.read_text()
    fields = sorted(json.loads(original))
    extra = ["rope_scaling", "rope_parameters", "sparse_config", "layer_types"]
    field = data.draw(st.sampled_from([*fields, *extra]))
    try:
        path.write_text(json.dumps(json.loads(original) | {field: value}))
        _try(folder, content)
    finally:
        path.write_text(original)
