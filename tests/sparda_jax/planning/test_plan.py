"""A plan's best batches, verdicts and refusals."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from sparda_jax.config import CacheConfig, ConfigError, SparseConfig
from sparda_jax.machine import Limit
from sparda_jax.mesh import MeshConfig
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import num_parameters
from sparda_jax.planning.limits import (
    MemoryLimits,
    shortfall,
)
from sparda_jax.planning.memory import (
    GIB,
)
from sparda_jax.planning.plan import plan
from sparda_jax.planning.rates import Rates, recorded_rates

TINY = PRESETS["tiny"]
RATES = Rates(memory=1e12, fetch=1e10, peak=1e14)


def _plan(**changes):
    arguments = {
        "context": 131072,
        "hbm_gib": 80.0,
        "host_gib": 512.0,
        "rates": recorded_rates("NVIDIA H200"),
    }
    return plan("minicpm4.1-8b", **(arguments | changes))


@pytest.mark.usefixtures("without_type_checks")
def test_largest_options_fit_and_one_more_does_not():
    # With slots that fill what is left, fewer rows may be faster.
    least = CacheConfig(device_blocks=None)
    found = _plan(cache=least)
    bounds = MemoryLimits(Limit(80 * GIB, ""), Limit(512 * GIB, ""))
    for best in (found.resident_best, found.offload_best):
        assert best.fits
        assert best.memory.device <= 80 * GIB
        assert best.memory.host <= 512 * GIB
        more = _plan(batch=best.batch + 1, cache=least)
        one = more.resident if best is found.resident_best else more.offload
        assert not one.fits
        assert shortfall(one.memory, bounds) is not None
    assert found.offload_best.batch > found.resident_best.batch


@pytest.mark.usefixtures("without_type_checks")
def test_host_memory_can_be_what_runs_out():
    found = _plan(host_gib=20.0)
    # Eight heads-and-layers' worth of 4 GiB a sequence, layer 0 resident.
    assert found.offload_best.batch == math.floor(20 / (4 * 31 / 32))


@pytest.mark.usefixtures("without_type_checks")  # ten plans
def test_verdicts():
    assert _plan(miss=0.3).verdict.startswith("do not offload: 0.")
    often = _plan(miss=0.02, batch=2)
    assert often.verdict.startswith("offload: ")
    assert "At batch 2 do not offload" in often.verdict
    assert often.offload_pays
    assert _plan(context=2**21, hbm_gib=60.0, max_new_tokens=1).verdict.startswith(
        "offload: not even one sequence fits resident"
    )
    assert _plan(hbm_gib=8.0).verdict.startswith("does not fit: not even one")
    assert _plan(host_gib=0.5).verdict.startswith("do not offload: it does not fit in")
    many = _plan(miss=0.3, batch=60)
    assert many.verdict.endswith("Only if 60 sequences must run at a time: they fit")
    assert _plan(attention="dense").pays_from is None


@pytest.mark.slow
def test_break_even_and_crossover_are_where_they_say():
    found = _plan()
    assert 0 < found.break_even < 1
    assert _plan(miss=found.break_even).offload_pays
    assert not _plan(miss=found.break_even + 0.002).offload_pays
    assert _plan(context=found.pays_from).offload_pays
    below = found.pays_from * 2 // 3
    assert not _plan(context=below).offload_pays


@pytest.mark.slow
def test_notes_tell_of_longrope_and_assumptions():
    notes = " ".join(_plan().notes)
    assert "more than the 65,536" in notes
    assert "no measurement" in notes
    assert "more than" not in " ".join(_plan(context=65536).notes)
    without = dataclasses.replace(recorded_rates("NVIDIA H200"), peak=None)
    assert "the peak is not known" in " ".join(_plan(rates=without).notes)
    assert "room for 73,728" in " ".join(_plan(context=70000).notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context=0"),
        ({"context": 256}, "context=256 is not allowed: it must be an integer of at"),
        ({"context": 2**30}, f"context={2**30}"),
        ({"hbm_gib": 0.0}, "hbm_gib=0.0"),
        ({"hbm_gib": math.nan}, "hbm_gib=nan"),
        ({"host_gib": -1.0}, "host_gib=-1.0"),
        ({"batch": 0}, "batch=0"),
        ({"miss": 1.5}, "miss=1.5"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"attention": "magic"}, "attention='magic'"),
        ({"attention": "nosa"}, "key bias"),
        ({"cache": CacheConfig(device_blocks=50)}, "CacheConfig.device_blocks=50"),
        (
            {"attention": "infllm_v2", "cache": CacheConfig(prefetch="lookahead")},
            "CacheConfig.prefetch='lookahead'",
        ),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(ConfigError) as refused:
        _plan(**changes)
    assert message in str(refused.value)


def test_plan_takes_a_shape_of_ones_own():
    found = plan(
        TINY.model,
        context=4096,
        hbm_gib=0.5,
        host_gib=0.5,
        rates=RATES,
        sparse=SparseConfig(local_blocks=2, block_budget=6),
        dtype=jnp.float32,
    )
    assert found.resident.memory.weights == 4 * num_parameters(TINY.model)


def test_a_preset_has_the_queries_of_its_published_heads():
    """Of a shape alone nobody knows which heads it will have: one query is planned."""
    name = "qwen2.5-coder-0.5b"
    size = {"context": 8192, "hbm_gib": 20.0, "host_gib": 20.0}
    size["rates"] = recorded_rates("H200")
    of_preset = plan(name, **size)
    of_shape = plan(PRESETS[name].model, sparse=of_preset.sparse, **size)
    config = of_preset.model
    assert config.forecast_queries == config.group_size == 7
    assert config.forecast_reads == "attended" and of_shape.model.forecast_queries == 1
    heads = of_preset.resident.memory.forecast_heads
    assert heads == 7 * of_shape.resident.memory.forecast_heads == 24 * 896 * 896 * 2


@pytest.mark.usefixtures("without_type_checks")
def test_a_mesh_is_planned_by_the_device():
    """Of two devices each holds half of the layers, the KV and the vocabulary."""
    rates = recorded_rates("H100")
    plans = [
        plan(
            "llama-3.1-70b",
            context=131072,
            hbm_gib=80.0,
            host_gib=2048.0,
            rates=rates,
            miss=0.05,
            mesh=mesh,
        )
        for mesh in (None, MeshConfig(model=4))
    ]
    one, four = (one.offload.memory for one in plans)
    assert one.weights * 0.249 < four.weights < one.weights * 0.251
    assert four.host == one.host // 4
    assert plans[0].offload_best is None
    assert plans[1].offload_best is not None
    assert any("mesh data=1,model=4" in note for note in plans[1].notes)
    with pytest.raises(ConfigError, match="model=3 cannot divide num_kv_heads=8"):
        plan(
            "llama-3.1-70b",
            context=4096,
            hbm_gib=80.0,
            host_gib=1.0,
            rates=rates,
            mesh=MeshConfig(model=3),
        )
