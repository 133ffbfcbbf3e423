"""What is prefetched: lists by their layer, recall, and who pays for a miss."""

import dataclasses

import numpy as np
import pytest
from trace_cases import drifting_trace

from benchmarks.look_ahead import figures, main, prefetched_lists
from sparda_jax.checks import ConfigError
from sparda_jax.planning.traces import write_trace

OWN = drifting_trace(layers=4)


def test_who_sends_what():
    lists = prefetched_lists(OWN, OWN)
    np.testing.assert_array_equal(lists["forecast"][1:], OWN.listed[1:])
    np.testing.assert_array_equal(lists["reuse"][3], OWN.listed[2])
    np.testing.assert_array_equal(lists["reuse-2"][3], OWN.listed[1])
    np.testing.assert_array_equal(lists["last-token"][:, :, 5], OWN.listed[:, :, 4])
    for name, empty in (("forecast", 1), ("reuse", 1), ("reuse-2", 2), ("none", 4)):
        assert not lists[name][:empty].any()


def test_a_perfect_forecast_leaves_nothing_to_wait_for():
    lists = prefetched_lists(OWN, OWN)
    perfect, none = (figures(OWN, lists[name], 2) for name in ("forecast", "none"))
    assert perfect["recall"] == 1 and none["recall"] == 0
    curve = dataclasses.replace(OWN, listed=OWN.listed[2:]).miss_curve((1.0, 2.0, 4.0))
    for size, share in zip(("1", "2", "4"), curve, strict=True):
        ahead, missing = perfect["traffic"][size], none["traffic"][size]
        assert ahead["waited_for"] == missing["ahead"] == 0
        assert ahead["ahead"] == missing["waited_for"]
        # The curve's first list is the prompt's last: it begins with no older ones.
        assert ahead["ahead"] <= share < ahead["ahead"] + 0.02
    # Lists of layers that have nothing to do with each other only take room.
    reuse = figures(OWN, lists["reuse"], 2)
    assert reuse["recall"] < 0.6
    assert reuse["traffic"]["1"]["waited_for"] > none["traffic"]["1"]["waited_for"]


def test_traces_of_other_tokens_are_refused(tmp_path, capsys):
    other = dataclasses.replace(OWN, text="another")
    with pytest.raises(ConfigError, match="forecast='another' is not allowed as text"):
        prefetched_lists(OWN, other)
    for name, trace in (("own", OWN), ("other", other)):
        write_trace(tmp_path / f"{name}.npz", trace)
    paths = [str(tmp_path / f"{name}.npz") for name in ("own", "other")]
    assert main([paths[0], "--json", str(tmp_path / "found.json")]) == 0
    assert "last-token" in capsys.readouterr().out
    assert main([paths[0], "--forecast", paths[1]]) == 2
