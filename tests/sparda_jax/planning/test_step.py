"""The bound of a decode step, by hand."""

import dataclasses

import pytest

from sparda_jax.cache.routes import named_route
from sparda_jax.cache.settings import LayerSettings, OffloadSettings
from sparda_jax.config import CacheConfig
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import num_parameters
from sparda_jax.planning.rates import Rates
from sparda_jax.planning.step import step_time
from sparda_jax.sparse.selectors import get_selector

MINICPM = PRESETS["minicpm4.1-8b"]
RATES = Rates(memory=1e12, fetch=1e10, peak=1e14)


def _step(prefetch=None, layer0="resident", rates=RATES, miss=0.5, kind="offload"):
    config, sparse = MINICPM.model, MINICPM.sparse
    offload = None
    if kind == "offload":
        offload = OffloadSettings(named_route("dynamic_slice"), prefetch != "none")
    settings = LayerSettings(config, sparse, get_selector("sparda"), offload=offload)
    return step_time(
        settings,
        CacheConfig(kind="offload", layer0=layer0),
        rates,
        batch=16,
        capacity=131072,
        context=131072,
        dtype="bfloat16",
        miss=miss,
    )


def test_step_time_by_hand():
    block = 64 * 2 * 128 * 2
    missed = 0.5 * 95 * 16 * 2 * block
    parameters = num_parameters(MINICPM.model) - 73448 * 4096 + 32 * 4096 * 256
    keys = 32 * 16 * 2 * (131072 // 16) * 128 * 2
    device = 2 * parameters + 32 * 16 * 2 * 96 * block + keys
    found = _step(kind="resident")
    assert found.memory == pytest.approx(device / 1e12)
    assert found.fetch == found.hidden == 0
    assert found.seconds == max(found.memory, found.compute)
    away = _step()
    assert away.fetch == pytest.approx(31 * missed / 1e10)
    assert away.memory == pytest.approx((device + 3 * 31 * missed) / 1e12)
    flops = 2 * parameters * 16 + 32 * 16 * 2 * (96 * 64 * 4 * 16 + 8192 * 2) * 128
    assert away.compute == pytest.approx(flops / 1e14)


def test_lookahead_hides_and_waiting_adds():
    ahead, waiting = _step(), _step(prefetch="none")
    device = max(ahead.memory, ahead.compute)
    assert ahead.seconds == pytest.approx(max(device, ahead.fetch))
    assert waiting.seconds == pytest.approx(device + ahead.fetch)
    assert ahead.bound_by == "fetch"
    # Nobody looks ahead for layer 0.
    first = _step(layer0="offload")
    assert first.fetch == pytest.approx(ahead.fetch * 32 / 31)
    assert first.hidden == pytest.approx(ahead.fetch)
    assert _step(miss=0.0).seconds == pytest.approx(_step(kind="resident").seconds)
    slow = _step(rates=dataclasses.replace(RATES, peak=1e10))
    assert slow.seconds == slow.compute
