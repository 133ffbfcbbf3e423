"""Damaged and random GGUF files: CheckpointError, or a model."""

import pathlib
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.source import open_checkpoint


@pytest.fixture(scope="module")
def intact(session_kit) -> bytes:
    return session_kit.tiny_gguf().read_bytes()


def _try(folder: pathlib.Path, content: bytes) -> bool:
    """Opens and loads; only CheckpointError may come out. True if it went well."""
    path = folder / "fuzz.gguf"
    path.write_bytes(content)
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return False
    source.load(workers=1)
    if source.tokenizer is not None:
        source.tokenizer.decode(source.tokenizer.encode("hello, world"))
    return True


def _positions(content: bytes) -> list[int]:
    """Places of every kind: all of the first 3 kB, the tensor entries, and the data."""
    entries = content.index(b"token_embd.weight")
    return [
        *range(1, 1500, 7),
        *range(entries - 40, entries + 1200, 5),
        *range(entries + 1200, len(content), 9001),
    ]


def test_truncation(session_kit, intact):
    assert _try(session_kit.folder, intact)
    for position in [*_positions(intact)[::2], len(intact) - 1]:
        assert not _try(session_kit.folder, intact[:position])


def _overwrite(content: bytes, position: int, value: int) -> bytes:
    damaged = bytearray(content)
    damaged[position : position + 8] = struct.pack("<Q", value)
    return bytes(damaged[: len(content)])


NUMBERS = [2**64 - 1, 2**63, 2**40, 2**32 - 1, 2**27, 0]


@pytest.mark.parametrize("value", NUMBERS)
def test_huge_and_zero_numbers_anywhere(session_kit, intact, value):
    for position in _positions(intact)[::4]:
        _try(session_kit.folder, _overwrite(intact, position, value))


def test_huge_numbers_take_no_memory(session_kit, intact):
    """Few places, as counting memory makes opening ten times as slow."""
    tracemalloc.start()
    for number, position in enumerate(_positions(intact)[::12]):
        value = NUMBERS[number % len(NUMBERS)]
        _try(session_kit.folder, _overwrite(intact, position, value))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    )
)
def test_random_damage(session_kit, intact, changes):
    damaged = bytearray(intact)
    header = intact.index(b"token_embd.weight") + 1200
    for place, value in changes:
        damaged[int(place * header)] = value
    _try(session_kit.folder, bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(session_kit, content):
    _try(session_kit.folder, b"GGUF\3\0\0\0" + content)
