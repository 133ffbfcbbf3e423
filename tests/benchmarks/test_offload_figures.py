"""What rows of `benchmarks.offload` say together, and its ways of fetching."""

import types

import jax.numpy as jnp
import pytest

from benchmarks import offload, offload_figures, offload_ways
from sparda_jax.cache import routes
from sparda_jax.checks import ConfigError
from sparda_jax.models.presets import get_preset


def _row(mode, slots, step, least):
    return {
        "mode": mode,
        "batch": 4,
        "slots": slots,
        "step_ms": step,
        "least_ms": least,
    }


def test_the_hidden_share_is_of_what_waiting_adds_to_a_resident_forecast():
    rows = [
        _row("resident", None, 9.0, 9.0),
        _row("resident-sparda", None, 6.0, 5.0),
        _row("sparda-none", 2.0, 10.0, 9.0),
        _row("sparda/8", 2.0, 7.0, 6.0),
        _row("sparda-none", "all", 6.0, 5.0),
        _row("sparda", "all", 5.9, 5.0),
    ]
    assert offload_figures.hidden(rows) == [
        "batch 4, slots 2.0, sparda/8 hides 75% of 4.00 ms that offload adds "
        "(by the shortest chunks 75% of 4.00 ms)",
        "batch 4, slots all, sparda hides nothing of 0.00 ms that offload adds "
        "(by the shortest chunks nothing of 0.00 ms)",
    ]
    assert offload_figures.hidden(rows[:1] + rows[2:]) == []


def test_every_way_has_a_profile_of_its_own(monkeypatch):
    state, asked = types.SimpleNamespace(cache=None), []
    state.cache = types.SimpleNamespace(capacity=64)
    names = ("sparda/8", "sparda/16")
    cases = [offload._Case(name, "sparda", (None, None), print, 0.0) for name in names]
    group = offload._Group(1.0, cases, state, [[], []], [0.0, 0.0])
    monkeypatch.setattr(offload, "_groups", lambda *_: iter([(None, group)]))
    monkeypatch.setattr(offload, "row_of", lambda name, *_: {"mode": name})
    monkeypatch.setattr(
        offload, "time_steps", lambda *given: asked.append(given[5]) or ([], 0.0, state)
    )
    arguments = types.SimpleNamespace(rounds=1)
    rows = list(offload.measure_batch(None, None, 4, ["sparda"], arguments, None, None))
    assert asked == ["sparda-8", "sparda-16"]
    assert [row["mode"] for row in rows] == list(names)


def test_programs_of_a_gather_are_a_kernels(monkeypatch):
    route, asked = routes.KernelRoute("mosaic", programs=8), []
    monkeypatch.setattr(
        routes, "host_gather", lambda blocks, *_, **how: asked.append(how) or blocks
    )
    listed = jnp.zeros((3,), jnp.int32)
    route.fetch(jnp.zeros((3, 2)), listed, jnp.int32(3), None, on_side_stream=False)
    assert asked[0]["programs"] == 8
    assert asked[0]["implementation"] == "mosaic_gpu"
    refused = "--gather-programs=8 is not allowed: .* 'dynamic_slice' is no kernel"
    arguments = offload._parser().parse_args(
        "--model tiny --context 1024 --batch 1 --steps 8 --miss 0.1 --mode sparda "
        "--gather-programs 8 --route dynamic_slice".split()
    )
    preset = get_preset("tiny")
    drift = offload_ways.Choice(None, 1024, 0.8)
    way = offload_ways.mode_settings(
        preset.shape(None, 2048), preset.sparse, "sparda", drift, 1.0, arguments
    )
    assert offload._with_programs(way, None) is way
    with pytest.raises(ConfigError, match=refused):
        offload._with_programs(way, 8)


@pytest.mark.parametrize(
    "ways",
    ["--mode resident sparse", "--mode sparda --slots all", "--mode sparda-2"],
)
def test_programs_of_a_gather_that_no_way_has_are_refused(ways, capsys):
    assert offload.main([*"--gather-programs 8 16".split(), *ways.split()]) == 2
    said = capsys.readouterr().err
    assert "--gather-programs=[8, 16] is not allowed" in said and said.count("\n") == 1
