"""What cannot fit is refused before anything is allocated."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import Case

import sparda_jax as sj
from sparda_jax.config import CacheConfig, ConfigError
from sparda_jax.engine import batch, call
from sparda_jax.machine import Limit
from sparda_jax.planning import limits
from sparda_jax.planning.limits import (
    MemoryLimits,
    largest_batch,
    memory_limits,
    shortfall,
)
from sparda_jax.planning.memory import (
    GIB,
    memory_plan,
    tree_bytes,
)


@given(most=st.integers(0, 5000))
def test_largest_batch(most):
    assert largest_batch(lambda batch: batch <= most) == min(most, 4096)


@pytest.fixture(scope="module")
def lm():
    return sj.load("tiny", attention="infllm_v2", storage="stacked")


@pytest.fixture
def no_allocation(monkeypatch):
    """Fails a test that gets as far as making a cache."""

    def never(*arguments, **named):
        raise AssertionError("a refused request must not allocate")

    monkeypatch.setattr(batch, "new_state", never)
    monkeypatch.setattr(call, "next_state", never)


def _refused(lm, prompts, **arguments) -> str:
    with pytest.raises(ConfigError) as refused:
        sj.generate(lm, prompts, **arguments)
    return str(refused.value)


def _with(lm, **cache):
    return sj.with_attention(lm, "infllm_v2", cache=CacheConfig(**cache))


ROWS = [[5] * 1000] * 4


def test_device_memory_too_small(lm, no_allocation):
    message = _refused(_with(lm, device_limit=2_000_000), ROWS)
    assert "of device memory" in message
    assert "CacheConfig.device_limit=2000000 (1.9 MiB) is the limit" in message
    assert "batch 4 with room for 1,536 tokens each needs" in message
    assert "prefill: tile scratch" in message
    assert "CacheConfig(kind='offload')" in message
    message = _refused(_with(lm, device_limit=2_000_000, kind="offload"), ROWS)
    assert "fewer CacheConfig.device_blocks" in message


def test_the_message_says_how_many_would_fit(lm, no_allocation):
    limit = Case("infllm_v2", batch=2, prompt=1000, max_new=64).plan().device
    message = _refused(_with(lm, device_limit=limit), ROWS)
    assert "of resident sequences like these, 2 fit" in message


def test_host_memory_too_small(lm, no_allocation):
    message = _refused(_with(lm, kind="offload", host_limit=1_000_000), ROWS)
    # Two of three layers: 4 rows, 2 heads, 1,536 tokens, K and V of 16 float32.
    assert "needs 3.0 MiB of host memory" in message
    assert "CacheConfig.host_limit=1000000 (976.6 KiB) is the limit" in message
    assert "CacheConfig(kind='resident')" in message


@pytest.mark.slow
def test_what_fits_is_not_refused(lm):
    chosen = _with(lm, kind="offload", host_limit=2**22, device_limit=2**25)
    out = sj.generate(chosen, ROWS, max_new_tokens=2)
    assert len(out.tokens) == 4


def test_terabytes_are_refused_at_once(lm, no_allocation):
    endless = dataclasses.replace(lm.config, max_context=2**40)
    lm = dataclasses.replace(lm, config=endless)
    for kind in ("resident", "offload"):
        chosen = dataclasses.replace(lm, cache=CacheConfig(kind=kind))
        message = _refused(chosen, [[3]] * 64, max_new_tokens=2**31 - 1)
        assert "TiB of memory" in message
        assert "memory (" in message


@pytest.mark.slow
def test_a_conversation_that_grows_needs_both_caches(lm, monkeypatch):
    prompt = [[5] * 200]
    first = sj.generate(lm, prompt, max_new_tokens=2)
    later = [[5] * 1200]
    shapes = Case("infllm_v2", batch=1, prompt=1403, max_new=2).shapes
    held = first.conversation.state.cache.capacity
    assert held < shapes.capacity
    # Enough for the larger cache alone; not while the smaller one is there too.
    both = tree_bytes((lm.model, first.conversation.state))
    small = _with(lm, device_limit=both + 100_000)
    message = _refused(small, later, conversation=first.conversation, max_new_tokens=2)
    assert "device memory" in message


class _Device:
    """A device that tells its memory."""

    platform = "cpu"

    def __init__(self, limit: int, in_use: int):
        self.stats = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self):
        return self.stats


def _pretend(monkeypatch, limit: int, in_use: int = 0) -> _Device:
    device = _Device(limit, in_use)
    monkeypatch.setattr(jax, "local_devices", lambda *_: [device])
    return device


def test_limits_of_a_gpu(monkeypatch):
    device = _pretend(monkeypatch, 80 * GIB)
    monkeypatch.setattr(limits, "physical_memory", lambda: Limit(512 * GIB, "machine"))
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    found = memory_limits(CacheConfig())
    assert found.device.size == device.stats["bytes_limit"]
    assert found.host.size == round(0.96 * 64 * GIB)
    assert "96% of XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=64" in str(found.host)
    assert found.both is None
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "600")
    assert memory_limits(CacheConfig()).host.size == 512 * GIB
    chosen = memory_limits(CacheConfig(device_limit=5, host_limit=7))
    assert (chosen.device.size, chosen.host.size) == (5, 7)


def test_limits_of_a_cpu():
    found = memory_limits(CacheConfig())
    assert found.device is None
    assert found.host is None
    assert found.both.size > GIB // 4
    assert memory_limits(CacheConfig(host_limit=7)).host.size == 7


def test_device_and_host_share_a_cpus_memory():
    found = Case("infllm_v2", kind="offload").plan()
    total = found.device + found.host
    assert shortfall(found, MemoryLimits(both=Limit(total, "it"))) is None
    message = shortfall(found, MemoryLimits(both=Limit(total - 1, "it")))
    assert "of memory, and it (" in message
    assert "host store" in message


@pytest.mark.usefixtures("without_type_checks")  # the device is a stand-in
def test_arrays_of_others_count(lm, monkeypatch):
    settings, cache = dataclasses.replace(lm.settings), CacheConfig()
    shapes = Case("infllm_v2", prompt=1000).shapes
    arguments = (settings, cache, 2, shapes)
    rest = {"dtype": jnp.dtype("float32"), "storage": "stacked", "forecast": False}
    need = memory_plan(settings, cache, batch=2, shapes=shapes, **rest)
    device = _pretend(monkeypatch, need.device + 1000, need.weights)
    limits.refuse_what_cannot_fit(*arguments, **rest)
    device.stats["bytes_in_use"] = need.weights + 2000
    with pytest.raises(ConfigError, match=r"beside 2\.0 KiB that other arrays hold"):
        limits.refuse_what_cannot_fit(*arguments, **rest)
    # A limit of one's own is for this request.
    own = CacheConfig(device_limit=need.device)
    limits.refuse_what_cannot_fit(settings, own, 2, shapes, **rest)


@pytest.mark.usefixtures("without_type_checks")
def test_a_host_store_that_grows_counts_with_the_one_it_was():
    case = Case("sparda", kind="offload", prompt=1000)
    small = dataclasses.replace(case.shapes, capacity=case.shapes.capacity // 2)
    arguments = {"batch": 2, "dtype": "float32", "storage": "stacked"}
    new = memory_plan(case.settings, case.cache, shapes=case.shapes, **arguments)
    old = memory_plan(case.settings, case.cache, shapes=small, **arguments)
    assert 0 < old.host < new.host
    held = SimpleNamespace(cache=SimpleNamespace(capacity=small.capacity))

    def ask(host_limit: int, held: object) -> None:
        cache = dataclasses.replace(case.cache, host_limit=host_limit)
        limits.refuse_what_cannot_fit(
            case.settings,
            cache,
            2,
            case.shapes,
            dtype=jnp.dtype("float32"),
            storage="stacked",
            forecast=True,
            held=held,
        )

    ask(new.host, None)
    ask(new.host + old.host, held)
    with pytest.raises(ConfigError, match="while the conversation's cache grows"):
        ask(new.host + old.host - 1, held)
