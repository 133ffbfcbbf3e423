"""The planner's figures against the compiler's and real arrays; refusals; verdicts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparda_jax as sj
from sparda_jax.cache.memory import host_shape
from sparda_jax.config import CacheConfig, ConfigError, SparseConfig
from sparda_jax.engine import session
from sparda_jax.engine.policy import offload_settings
from sparda_jax.inference import limits
from sparda_jax.inference.generate import (
    Prompt,
    Request,
    Shapes,
    advance_call,
    begin_call,
    new_state,
    plan_shapes,
)
from sparda_jax.inference.layer_store import LayerSettings, OffloadSettings
from sparda_jax.inference.limits import (
    Limit,
    MemoryLimits,
    largest_batch,
    memory_limits,
    shortfall,
)
from sparda_jax.inference.measure import measure_rates
from sparda_jax.inference.memory_plan import (
    GIB,
    abstract_state,
    memory_plan,
    tree_bytes,
)
from sparda_jax.inference.planner import Rates, plan, recorded_rates, step_time
from sparda_jax.inference.sampling import SamplingConfig, sampling_state
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.rope import model_rope
from sparda_jax.models.spec import num_forecast_parameters, num_parameters
from sparda_jax.models.weights import abstract_decoder
from sparda_jax.sparse.selectors import get_selector

TINY, NOSA, MINICPM = (PRESETS[n] for n in ("tiny", "tiny-nosa", "minicpm4.1-8b"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, planned and compiled."""

    attention: str = "sparda"
    kind: str = "resident"
    preset: str = "tiny"
    storage: str = "stacked"
    batch: int = 2
    prompt: int = 1000
    chunk: int | None = None
    slots: int | None = None
    layer0: str = "resident"
    prefetch: str | None = None
    tile: int = 256
    max_new: int = 100
    dtype: str = "float32"

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            kind=self.kind,
            device_blocks=self.slots,
            layer0=self.layer0,
            prefetch=self.prefetch,
        )

    @property
    def settings(self) -> LayerSettings:
        preset = PRESETS[self.preset]
        selector = get_selector(self.attention)
        offload = offload_settings(self.cache, selector)
        return LayerSettings(preset.model, preset.sparse, selector, offload=offload)

    @property
    def shapes(self) -> Shapes:
        piece = self.chunk or self.prompt
        return plan_shapes(
            piece,
            farthest_start=(self.prompt - 1) // piece * piece,
            longest=self.prompt,
            max_new=self.max_new,
            tile_size=self.tile,
            block_size=self.settings.sparse.block_size,
        )

    def plan(self):
        return memory_plan(
            self.settings,
            self.cache,
            batch=self.batch,
            shapes=self.shapes,
            dtype=self.dtype,
            storage=self.storage,
        )

    def arguments(self):
        """Model, state, prompt and request of shapes."""
        settings = self.settings
        config = settings.config
        model = abstract_decoder(
            config,
            self.dtype,
            storage=self.storage,
            forecast=settings.selector.needs_forecast,
        )
        state, store = abstract_state(
            model, settings, self.cache, self.batch, self.shapes
        )
        if store is not None:
            store = host_shape(store.shape, store.dtype)
            state = state._replace(cache=state.cache._replace(store=store))
        request = Request(
            sampling=sampling_state(SamplingConfig(), 0, self.batch),
            stops=jnp.full((16,), -1, jnp.int32),
            max_new=jnp.full((self.batch,), self.max_new, jnp.int32),
            steps=jnp.int32(1),
            rope=model_rope(config, self.prompt),
        )
        prompt = Prompt(
            jnp.zeros((self.batch, self.shapes.prompt), jnp.int32),
            jnp.ones((self.batch,), jnp.int32),
        )
        return model, state, prompt, request

    def compiled(self):
        """What XLA says of prefill and of decode."""
        model, state, prompt, request = self.arguments()
        settings, tile = self.settings, self.shapes.tile
        begin = begin_call.lower(
            model, state, prompt, request, settings=settings, tile_size=tile
        )
        advance = advance_call.lower(model, state, request, settings=settings)
        return begin.compile().memory_analysis(), advance.compile().memory_analysis()


def _peak(analysis) -> int:
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


COMPILED = [
    Case(kind="offload"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case(),
            Case(storage="per_layer"),
            Case("dense"),
            Case("infllm_v2"),
            Case("infllm_v2", kind="offload", batch=3),
            Case("infllm_v2", kind="offload", storage="per_layer"),
            Case(kind="offload", storage="per_layer"),
            Case("nosa", preset="tiny-nosa"),
            Case("nosa", kind="offload", preset="tiny-nosa", layer0="offload"),
            Case(kind="offload", preset="tiny-nosa", slots=12),
            Case(kind="offload", prompt=3900, batch=1),
            Case(prompt=3900, batch=4, chunk=512),
            Case(kind="offload", prompt=3900, batch=4, chunk=512),
            Case("dense", kind="offload", slots=10_000),
            Case(kind="offload", slots=10_000),
            Case(kind="offload", prefetch="none"),
            Case(kind="offload", prompt=10),
        )
    ),
]


@pytest.mark.parametrize("case", COMPILED, ids=repr)
def test_figures_equal_the_compiled_analysis(case):
    found = case.plan()
    begin, advance = case.compiled()
    model, state, prompt, request = case.arguments()
    # What is there from call to call is exact. On a CPU the host store is an argument
    # like the others. (Prefill makes no use of the request's step count.)
    assert found.persistent + found.host == tree_bytes((model, state))
    used = found.persistent + found.host + tree_bytes(request)
    blocks = found.capacity // case.settings.sparse.block_size
    if not case.settings.selector.lists_blocks(blocks, case.settings.sparse):
        # Where every block is read, heads are held, but passed to no program.
        used -= found.forecast_heads
    assert advance.argument_size_in_bytes == used
    used += tree_bytes(prompt) - request.steps.nbytes
    assert begin.argument_size_in_bytes == used
    assert begin.alias_size_in_bytes == tree_bytes(state)
    assert found.prefill_peak + found.host == pytest.approx(_peak(begin), rel=0.05)
    assert found.decode_peak + found.host == pytest.approx(_peak(advance), rel=0.05)
    # The estimates alone, which are the smaller part of a peak.
    scratch = found.prefill_peak - found.persistent
    assert scratch == pytest.approx(begin.temp_size_in_bytes, rel=0.15)


def _8b(kind: str, prompt: int, dtype: str) -> Case:
    return Case(
        kind=kind,
        preset="minicpm4.1-8b",
        batch=1,
        prompt=prompt,
        max_new=256,
        tile=1024,
        dtype=dtype,
    )


@pytest.mark.parametrize("kind", ["resident", "offload"])
@pytest.mark.parametrize("prompt", [32512, 130816])
def test_8b_arguments(kind, prompt):
    """Abstract shapes: nothing of the 8B model's 17 GB is allocated."""
    case = _8b(kind, prompt, "bfloat16")
    model, state, _, _ = case.arguments()
    found = case.plan()
    assert found.persistent + found.host == tree_bytes((model, state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("resident", 32512), ("offload", 32512), ("offload", 130816)],
)
def test_8b_figures_equal_the_compiled_analysis(kind, prompt):
    """In float32: a CPU turns bfloat16 weights into it, and other devices do not."""
    case = _8b(kind, prompt, "float32")
    found = case.plan()
    begin, advance = case.compiled()
    state = case.arguments()[1]
    assert begin.alias_size_in_bytes == tree_bytes(state), "the store is in place"
    assert found.prefill_peak + found.host == pytest.approx(_peak(begin), rel=0.02)
    assert found.decode_peak + found.host == pytest.approx(_peak(advance), rel=0.02)
    scratch = found.prefill_peak - found.persistent
    assert scratch == pytest.approx(begin.temp_size_in_bytes, rel=0.15)


@pytest.mark.parametrize(
    "case",
    [
        Case(storage="per_layer", batch=3),
        Case("nosa", kind="offload", preset="tiny-nosa", batch=3, slots=11),
        Case(kind="offload", storage="per_layer", layer0="offload", batch=1),
    ],
    ids=repr,
)
def test_persistent_parts_equal_real_arrays(case, deeper):
    model = deeper(case.preset == "tiny-nosa", case.storage)
    settings = case.settings
    state = new_state(model, settings, case.batch, case.shapes, case.cache)
    found = dataclasses.replace(case, dtype="float32").plan()
    heads = 0 if settings.selector.needs_forecast else tree_bytes(model.forecast)
    total = tree_bytes((model, state)) - heads
    assert found.persistent + found.host == total
    assert found.weights == 4 * num_parameters(settings.config)
    if case.kind == "offload":
        assert found.host == state.cache.store.nbytes
        assert found.slots == sum(layer.slots.nbytes for layer in state.cache.layers)
        assert found.staging == sum(area.nbytes for area in state.cache.spare)


def test_8b_device_bytes_grow_by_keys_and_scratch_alone():
    """From 32k to 128k an offloaded cache's slots, tables and staging stay."""
    short, long = (
        Case(kind="offload", preset="minicpm4.1-8b", prompt=p, chunk=8192, tile=1024)
        for p in (32512, 130816)
    )
    a, b = short.plan(), long.plan()
    assert (a.capacity, b.capacity) == (32768, 131072)
    for same in ("weights", "forecast_heads", "slots", "slot_tables", "staging"):
        assert getattr(a, same) == getattr(b, same) > 0
    assert b.generation == a.generation
    assert b.prompt_states == a.prompt_states
    for grown in ("kv", "kv_scratch", "host"):
        assert getattr(b, grown) == 4 * getattr(a, grown) > 0
    config = MINICPM.model
    windows = 98304 // 16 * config.num_kv_heads * config.head_dim * 4
    added = b.compressed_keys - a.compressed_keys
    assert added == 2 * config.num_layers * windows


def test_forecast_heads_are_counted_where_the_model_has_them():
    case = Case("dense")
    arguments = (case.settings, case.cache)
    rest = {"batch": 2, "shapes": case.shapes, "dtype": "float32"}
    without = memory_plan(*arguments, **rest)
    beside = memory_plan(*arguments, **rest, forecast=True)
    assert without.forecast_heads == 0
    assert beside.forecast_heads == 4 * num_forecast_parameters(TINY.model)
    assert beside.device - without.device == beside.forecast_heads


def test_parts_add_up():
    for case in (Case(), Case(kind="offload", batch=5)):
        found = case.plan()
        assert sum(size for _, size in found.parts()) == found.device


# Speed.

RATES = Rates(memory=1e12, fetch=1e10, peak=1e14)


def _step(prefetch=None, layer0="resident", rates=RATES, miss=0.5, kind="offload"):
    config, sparse = MINICPM.model, MINICPM.sparse
    offload = None
    if kind == "offload":
        offload = OffloadSettings("slices", prefetch != "none")
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


@given(most=st.integers(0, 5000))
def test_largest_batch(most):
    assert largest_batch(lambda batch: batch <= most) == min(most, 4096)


def _plan(**changes):
    arguments = {
        "context": 131072,
        "hbm_gib": 80.0,
        "host_gib": 512.0,
        "rates": recorded_rates("NVIDIA H200"),
    }
    return plan("minicpm4.1-8b", **(arguments | changes))


def test_largest_options_fit_and_one_more_does_not():
    found = _plan()
    bounds = MemoryLimits(Limit(80 * GIB, ""), Limit(512 * GIB, ""))
    for best in (found.resident_best, found.offload_best):
        assert best.fits
        assert best.memory.device <= 80 * GIB
        assert best.memory.host <= 512 * GIB
        more = _plan(batch=best.batch + 1)
        one = more.resident if best is found.resident_best else more.offload
        assert not one.fits
        assert shortfall(one.memory, bounds) is not None
    assert found.offload_best.batch > found.resident_best.batch


def test_host_memory_can_be_what_runs_out():
    found = _plan(host_gib=20.0)
    # Eight heads-and-layers' worth of 4 GiB a sequence, layer 0 resident.
    assert found.offload_best.batch == math.floor(20 / (4 * 31 / 32))


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


def test_break_even_and_crossover_are_where_they_say():
    found = _plan()
    assert 0 < found.break_even < 1
    assert _plan(miss=found.break_even).offload_pays
    assert not _plan(miss=found.break_even + 0.002).offload_pays
    assert _plan(context=found.pays_from).offload_pays
    below = found.pays_from * 2 // 3
    assert not _plan(context=below).offload_pays


def test_notes_tell_of_longrope_and_assumptions():
    notes = " ".join(_plan().notes)
    assert "more than the 65,536" in notes
    assert "no measurement" in notes
    assert "more than" not in " ".join(_plan(context=65536).notes)
    without = dataclasses.replace(recorded_rates("NVIDIA H200"), peak=None)
    assert "the peak is not known" in " ".join(_plan(rates=without).notes)
    assert "room for 98,304" in " ".join(_plan(context=70000).notes)


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


def test_bad_rates():
    with pytest.raises(ConfigError, match=r"Rates\.memory=0"):
        Rates(memory=0.0, fetch=1.0)


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


# Measuring.


def test_measured_rates_are_of_this_machine():
    found = measure_rates(head_dim=16, dtype=jnp.float32, store_bytes=2**20)
    assert found.device == jax.devices()[0].device_kind
    assert found.jax == jax.__version__
    assert found.block_bytes == 64 * 2 * 16 * 4
    rates = found.rates
    assert found.route == rates.route
    for rate in (rates.memory, rates.fetch, rates.link, rates.peak):
        assert 1e6 < rate < 1e16
    steps = measure_rates(route="steps", store_bytes=2**18, dtype=jnp.float32)
    assert steps.route == "steps"
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        measure_rates(route="mosaic")


def test_recorded_rates():
    found = recorded_rates("NVIDIA H200")
    assert (found.memory, found.fetch, found.link) == (4308e9, 45e9, 53.7e9)
    assert recorded_rates("cpu") is None
    assert recorded_rates("NVIDIA T4") is None


# Refusals.


@pytest.fixture(scope="module")
def lm():
    return sj.load("tiny", attention="infllm_v2", storage="stacked")


@pytest.fixture
def no_allocation(monkeypatch):
    """Fails a test that gets as far as making a cache."""

    def never(*arguments, **named):
        raise AssertionError("a refused request must not allocate")

    monkeypatch.setattr(session, "new_state", never)
    monkeypatch.setattr(session, "next_turn", never)


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
    message = _refused(_with(lm, device_limit=9_000_000), ROWS)
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
        message = _refused(chosen, [[3]] * 64, max_new_tokens=2**31)
        assert "TiB of memory" in message
        assert "memory (" in message


@pytest.mark.slow
def test_a_conversation_that_grows_needs_both_caches(lm, monkeypatch):
    prompt = [[5] * 200]
    first = sj.generate(lm, prompt, max_new_tokens=2)
    later = [[5] * 600]
    shapes = Case("infllm_v2", batch=1, prompt=803, max_new=2).shapes
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
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    return device


def test_limits_of_a_gpu(monkeypatch):
    device = _pretend(monkeypatch, 80 * GIB)
    monkeypatch.setattr(limits, "physical_memory", lambda: Limit(512 * GIB, "machine"))
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    found = memory_limits(CacheConfig())
    assert found.device.size == device.stats["bytes_limit"]
    assert found.host.size == 64 * GIB
    assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=64" in str(found.host)
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
