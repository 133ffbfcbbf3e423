"""The bound of a decode step, by hand."""

import dataclasses

import pytest

from sparda_jax.cache.codecs import named_codec
from sparda_jax.cache.routes import named_route
from sparda_jax.cache.settings import LayerSettings, OffloadSettings
from sparda_jax.config import CacheConfig
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import num_parameters
from sparda_jax.planning.rates import Rates, recorded_rates
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
        CacheConfig(kind="offload", device_blocks=None, layer0=layer0),
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


MEASURED = Rates(memory=2.69e12, fetch=4.67e10, peak=7e14, layer=52e-6)


@pytest.mark.parametrize(
    ("attention", "prefetch", "context", "batch", "miss", "milliseconds"),
    [
        ("infllm_v2", None, 131072, 10, None, 9.25),
        ("infllm_v2", None, 33792, 16, None, 8.96),
        ("infllm_v2", "none", 33792, 16, 0.17, 21.15),
        ("sparda", "none", 33792, 16, 0.17, 20.89),
        ("sparda", None, 33792, 16, 0.17, 13.10),
    ],
)
def test_what_an_h100_took_is_expected(
    attention, prefetch, context, batch, miss, milliseconds
):
    """Medians of whole steps, benchmarks.best and benchmarks.offload, JAX 0.11.2."""
    offload = None
    if miss is not None:
        offload = OffloadSettings(named_route("mosaic"), prefetch != "none")
    settings = LayerSettings(
        MINICPM.model, MINICPM.sparse, get_selector(attention), offload=offload
    )
    found = step_time(
        settings,
        CacheConfig(kind="offload", device_blocks=None),
        MEASURED,
        batch=batch,
        capacity=context,
        context=context,
        dtype="bfloat16",
        miss=miss or 0.0,
    )
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=0.05)
    assert found.seconds == found.bound + 32 * 52e-6


WHOLE = dataclasses.replace(
    MEASURED, memory=2.692e12, fetch=4.711e10, row=450e-9, decode=130e-9
)


@pytest.mark.parametrize(
    ("attention", "codec", "keys", "batch", "miss", "milliseconds"),
    [
        ("infllm_v2", None, "exact", 14, 0.0, 9.64),
        ("infllm_v2", None, "exact", 7, 0.0, 8.43),
        ("infllm_v2", "exact", "exact", 54, 0.0048, 18.57),
        ("sparda", "exact", "exact", 27, 0.0025, 11.64),
        ("sparda", "exact", "exact", 54, 0.0048, 15.10),
        ("sparda", "int8", "exact", 51, 0.0048, 15.13),
        ("sparda", "int8", "exact", 102, 0.068, 28.57),
        ("sparda", "int8", "int8", 100, 0.0407, 23.57),
    ],
)
def test_what_the_best_batches_took_is_expected(
    attention, codec, keys, batch, miss, milliseconds
):
    """benchmarks.best at 131,072 tokens on an H100, JAX 0.11.2, commit 1fad3e5."""
    offload = None
    if codec is not None:
        route, ahead = named_route("mosaic"), attention == "sparda"
        offload = OffloadSettings(route, lookahead=ahead, codec=named_codec(codec))
    sparse = dataclasses.replace(MINICPM.sparse, compressed_keys=keys)
    found = step_time(
        LayerSettings(MINICPM.model, sparse, get_selector(attention), offload=offload),
        CacheConfig(kind="offload", device_blocks=None),
        WHOLE,
        batch=batch,
        capacity=131072,
        context=131072,
        dtype="bfloat16",
        miss=miss,
    )
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=0.05)


@pytest.mark.parametrize(
    ("attention", "codec", "context", "batch", "miss", "milliseconds"),
    [
        ("infllm_v2", None, 131072, 14, 0.0, 7.64),
        ("infllm_v2", None, 131072, 7, 0.0, 6.78),
        ("infllm_v2", None, 131072, 3, 0.0, 6.31),
        ("sparda", "int8_slots", 131072, 102, 0.0098, 15.37),
        ("sparda", "int8_slots", 131072, 51, 0.0042, 10.66),
        ("sparda", "int8_slots", 131072, 25, 0.0042, 9.08),
        ("infllm_v2", "int8_slots", 131072, 96, 0.0042, 26.75),
        ("infllm_v2", "int8_slots", 131072, 48, 0.0042, 17.03),
        ("infllm_v2", "int8_slots", 131072, 24, 0.0042, 12.04),
        ("sparda", "exact", 32768, 16, 0.0048, 7.28),
        ("sparda", "exact", 32768, 8, 0.0023, 6.81),
        ("sparda", "exact", 32768, 8, 0.0429, 7.10),
    ],
)
def test_what_an_h200_took_is_expected(
    attention, codec, context, batch, miss, milliseconds
):
    """benchmarks.best and benchmarks.offload on an H200, JAX 0.11.2."""
    offload = None
    if codec is not None:
        route = named_route("mosaic")
        ahead = attention == "sparda"
        offload = OffloadSettings(route, lookahead=ahead, codec=named_codec(codec))
    keys = "int8" if codec == "int8_slots" else "exact"
    sparse = dataclasses.replace(MINICPM.sparse, compressed_keys=keys)
    found = step_time(
        LayerSettings(MINICPM.model, sparse, get_selector(attention), offload=offload),
        CacheConfig(kind="offload", device_blocks=None),
        dataclasses.replace(recorded_rates("H200"), memory=3.75e12, fetch=4.55e10),
        batch=batch,
        capacity=context,
        context=context,
        dtype="bfloat16",
        miss=miss,
    )
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=0.1)
