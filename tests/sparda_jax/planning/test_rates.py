"""Rates as given, as recorded and as measured here."""

import jax
import jax.numpy as jnp
import pytest

from sparda_jax.config import ConfigError
from sparda_jax.planning.measure import measure_rates
from sparda_jax.planning.rates import Rates, recorded_rates


def test_bad_rates():
    with pytest.raises(ConfigError, match=r"Rates\.memory=0"):
        Rates(memory=0.0, fetch=1.0)


def test_measured_rates_are_of_this_machine():
    found = measure_rates(head_dim=16, dtype=jnp.float32, store_bytes=2**20)
    assert found.device == jax.devices()[0].device_kind
    assert found.jax == jax.__version__
    assert found.block_bytes == 64 * 2 * 16 * 4
    rates = found.rates
    assert found.route == rates.route
    for rate in (rates.memory, rates.fetch, rates.link, rates.peak):
        assert 1e6 < rate < 1e16
    steps = measure_rates(route="host_loop", store_bytes=2**18, dtype=jnp.float32)
    assert steps.route == "host_loop"
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        measure_rates(route="mosaic")


def test_recorded_rates():
    found = recorded_rates("NVIDIA H200")
    assert (found.memory, found.fetch, found.link) == (4308e9, 45e9, 53.7e9)
    assert recorded_rates("H200") == recorded_rates("nvidia h200") == found
    assert recorded_rates("H100").source.startswith("recorded for NVIDIA H100 80GB")
    with pytest.raises(ConfigError, match=r"'NVIDIA H200'.* have it"):
        recorded_rates("nvidia")
    assert recorded_rates("cpu") is recorded_rates("H") is recorded_rates("") is None
    assert recorded_rates("NVIDIA T4") is None
