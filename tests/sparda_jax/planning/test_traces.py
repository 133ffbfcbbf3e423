"""Block traces: the file, what it refuses, and misses against a plain LRU cache."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from trace_cases import drifting_trace

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.config import ConfigError
from sparda_jax.planning.traces import read_trace, slot_misses, write_trace


@pytest.fixture(scope="module")
def trace():
    return drifting_trace()


@pytest.fixture(scope="module")
def written(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "walk.npz"
    write_trace(path, trace)
    return path


def test_a_trace_survives_its_file(trace, written, tmp_path):
    found = read_trace(written)
    np.testing.assert_array_equal(found.listed, trace.listed)
    for field in dataclasses.fields(trace):
        if field.name != "listed":
            assert getattr(found, field.name) == getattr(trace, field.name)
    again = tmp_path / "again.npz"
    write_trace(again, found)
    assert again.read_bytes() == written.read_bytes()
    assert np.load(written)["listed"].dtype == np.uint8  # NumPy alone reads it.


@pytest.mark.parametrize("count", [16, 24, 40])
def test_misses_are_those_of_a_plain_lru_cache(trace, count):
    lists = trace.listed.reshape(-1, *trace.listed.shape[2:])
    found = slot_misses(lists, trace.own_blocks, [count])[..., 0]
    for stream, asked in enumerate(lists):
        held: collections.OrderedDict[int, None] = collections.OrderedDict()
        for step, row in enumerate(asked):
            wanted = np.flatnonzero(row)
            missing = [b for b in wanted if b not in held]
            assert found[stream, step] == sum(
                b != trace.own_blocks[step] for b in missing
            )
            # Ties of age go to the lowest block, as in the simulation.
            for block in reversed(wanted):
                held[int(block)] = None
                held.move_to_end(int(block))
            while len(held) > count:
                held.popitem(last=False)


def test_a_larger_cache_misses_less(trace):
    curve = trace.miss_curve([1.0, 1.5, 2.0, 3.0, 4.0])
    assert (np.diff(curve) <= 0).all() and curve[-1] < curve[0] / 2
    # With slots for a list alone, what is new is missed, but for what was forced.
    assert curve[0] == pytest.approx(trace.new_share, rel=0.1)


def _with_header(path, change):
    with np.load(path) as held:
        header, listed = json.loads(bytes(held["header"]).decode()), held["listed"]
    change(header)
    text = json.dumps(header).encode()
    return {"header": np.frombuffer(text, np.uint8), "listed": listed}


_DAMAGE = {
    "another format": (lambda h: h.update(format="x"), "format and version"),
    "a field too few": (lambda h: h.pop("model"), "model"),
    "a field too many": (lambda h: h.update(more=1), "more"),
    "another budget": (lambda h: h.update(block_budget=15), "lists"),
    "another block size": (lambda h: h.update(block_size=32), "blocks"),
    "the lists of another place": (lambda h: h.update(tokens=4095), "blocks"),
    "block size 0": (lambda h: h.update(block_size=0), "block_size"),
    "another position": (lambda h: h.update(tokens=10), "blocks"),
    "no decode steps": (lambda h: h.update(prefill=120, decode=0), "prefill"),
    "more lists than there are": (lambda h: h.update(decode=100), "shape"),
    "a position that is none": (lambda h: h.update(tokens="x"), "tokens"),
}


@pytest.mark.parametrize("name", _DAMAGE)
def test_a_lying_header_is_refused(name, written, tmp_path):
    change, says = _DAMAGE[name]
    path = tmp_path / "bad.npz"
    np.savez(path, **_with_header(written, change))
    with pytest.raises(CheckpointError, match=says) as error:
        read_trace(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_refused(written, tmp_path):
    content, path = written.read_bytes(), tmp_path / "bad.npz"
    cases = [b"", b"no archive", content[: len(content) // 2]]
    for at in range(40, len(content), len(content) // 40):
        cases.append(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
    refused = 0
    for case in cases:
        path.write_bytes(case)
        try:
            read_trace(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    # A bit of the archive's own dates or the like changes nothing.
    assert refused > len(cases) * 3 // 4
    with pytest.raises(CheckpointError, match="no such file"):
        read_trace(tmp_path / "none.npz")
    np.savez(path, header=np.zeros(3, np.uint8))
    with pytest.raises(CheckpointError, match=r"bad\.npz"):
        read_trace(path)
    np.savez(path, header=np.array([{}], object), listed=np.zeros(1))
    with pytest.raises(CheckpointError, match=r"bad\.npz"):
        read_trace(path)


def test_lists_that_cannot_be_are_refused(trace):
    for wrong in (np.zeros_like(trace.listed), trace.listed[..., ::-1]):
        with pytest.raises(ConfigError, match="listed"):
            dataclasses.replace(trace, listed=wrong)
