"""The planner's share of misses: a trace's curve, at any budget and number of slots."""

import dataclasses
import pathlib

import pytest
from trace_cases import drifting_trace

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.config import CacheConfig, ConfigError, SparseConfig
from sparda_jax.planning.misses import MissCurve, curve_of, published_curve
from sparda_jax.planning.plan import plan
from sparda_jax.planning.rates import Rates
from sparda_jax.planning.traces import read_trace, slot_misses, write_trace

TRACES = pathlib.Path(__file__).parents[3] / "benchmarks" / "traces"
RATES = Rates(memory=1e12, fetch=1e10, peak=1e14)


def _plan(**changes):
    return plan(
        "tiny",  # 4 of its 8 blocks are forced
        context=4096,
        hbm_gib=1.0,
        host_gib=1.0,
        rates=RATES,
        **changes,
    )


def test_a_curve_gives_what_its_trace_misses():
    trace = drifting_trace()
    curve, sparse = curve_of(trace), SparseConfig(local_blocks=2, block_budget=16)
    lists = trace.listed.reshape(-1, *trace.listed.shape[2:])[:, trace.prefill - 1 :]
    misses = slot_misses(lists, trace.own_blocks[trace.prefill - 1 :], [16, 28, 40])
    share = misses[:, 21:].mean((0, 1)) / 15
    found = [curve.share(slots, sparse) for slots in (16, 28, 40)]
    assert found == pytest.approx(share, abs=1e-5)
    assert curve.share(10_000, sparse) == curve.shares[-1] * 12 / 15


def test_a_curve_serves_another_budget_by_its_scored_blocks():
    curve = MissCurve((1.0, 2.0, 4.0), (0.3, 0.1, 0.0), "drawn")
    wide = SparseConfig(local_blocks=32, block_budget=96)  # 34 forced, 62 scored
    assert curve.share(96, wide) == pytest.approx(0.3 * 62 / 95)
    assert curve.share(34 + 62 * 3, wide) == pytest.approx(0.05 * 62 / 95)
    forced = SparseConfig(local_blocks=2, block_budget=4)
    assert curve.share(4, forced) == 0.0


def test_published_curves_are_those_of_the_published_traces():
    for attention in ("infllm_v2", "sparda"):
        curve = published_curve(attention)
        model, text, chose, tokens = curve.source.split(", ")
        assert chose == attention
        found = [
            curve_of(trace)
            for path in TRACES.glob("*.npz")
            if (trace := read_trace(path)).text == text
            and (trace.model, trace.attention) == (model, attention)
            and tokens == f"{trace.length} tokens"
        ]
        assert found == [curve]
    assert published_curve("window") == published_curve("infllm_v2")


@pytest.mark.slow
def test_more_slots_miss_less(tmp_path):
    least = CacheConfig(kind="offload", device_blocks=None)
    small = _plan(cache=least)
    large = _plan(cache=CacheConfig(kind="offload", device_blocks=20))
    assert 0 < large.miss < small.miss / 5
    assert small.miss_source == published_curve("sparda").source
    path = tmp_path / "walk.npz"
    write_trace(path, drifting_trace())
    own = _plan(trace=path, cache=least)
    assert own.miss_source == "walk, none, infllm_v2, 4120 tokens"
    assert own.miss == pytest.approx(curve_of(drifting_trace()).shares[0] * 4 / 7)
    assert _plan(miss=0.25).miss == 0.25


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="None beside miss"):
        _plan(miss=0.1, trace="x.npz")
    with pytest.raises(CheckpointError, match="no such file"):
        _plan(trace=tmp_path / "none.npz")
    for change in ({"sizes": (2.0, 1.0, 3.0)}, {"shares": (0.1,)}):
        with pytest.raises(ConfigError, match=r"MissCurve\.sizes"):
            dataclasses.replace(
                MissCurve((1.0, 2.0, 4.0), (0.3, 0.1, 0.0), "x"), **change
            )
    with pytest.raises(ConfigError, match="shares"):
        MissCurve((1.0,), (1.5,), "x")
