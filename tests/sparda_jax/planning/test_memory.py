"""Bytes by part, against real arrays and the compiler's own figures."""

import dataclasses

import pytest
from planning_cases import Case

from sparda_jax.inference.generate import new_state
from sparda_jax.models.presets import PRESETS
from sparda_jax.models.spec import num_forecast_parameters, num_parameters
from sparda_jax.planning.memory import (
    memory_plan,
    tree_bytes,
)

TINY, MINICPM = PRESETS["tiny"], PRESETS["minicpm4.1-8b"]


def _peak(analysis) -> int:
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


COMPILED = [
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case("nosa", kind="offload", preset="tiny-nosa", layer0="offload"),
            Case(kind="offload", prompt=3900, batch=4, chunk=512),
            Case(kind="offload", layers_ahead=2, keys="int8"),
            Case(kind="offload", slots=10_000, codec="int8", storage="per_layer"),
            Case("snapkv", kind="evict", prompt=3900, batch=1, storage="per_layer"),
            Case(batch=8, prompt=200, vocab=32768),
        )
    ),
    *(
        pytest.param(case, marks=[pytest.mark.slow, pytest.mark.long])
        # Nearly every part of these is a part of one above.
        for case in (
            Case(),
            Case("infllm_v2", kind="offload", batch=3),
            Case(kind="offload", reads="attended", prompt=3900),
            Case(kind="offload"),
            Case("dense"),
            Case(kind="offload", storage="per_layer"),
            Case(kind="offload", slots=14, codec="int8"),
            Case(kind="offload", layers_ahead=2, storage="per_layer"),
            Case(keys="int8", prompt=3900),
            Case("snapkv", prompt=3900),
            Case("window", kind="evict", prompt=3900),
            Case(kind="offload", slots=10_000),
            Case("snapkv", kind="evict", prompt=3900),
            Case(storage="per_layer"),
            Case(kind="offload", slots=14, codec="int8_slots"),
            Case(kind="offload", slots=99, codec="int8_slots"),
            Case("infllm_v2"),
            Case("infllm_v2", kind="offload", storage="per_layer"),
            Case("nosa", preset="tiny-nosa"),
            Case(kind="offload", preset="tiny-nosa", slots=12),
            Case(kind="offload", prompt=3900, batch=1),
            Case(prompt=3900, batch=4, chunk=512),
            Case("dense", kind="offload", slots=10_000),
            Case(kind="offload", prefetch="none"),
            Case(kind="offload", prompt=10),
        )
    ),
]


@pytest.mark.parametrize("case", COMPILED, ids=repr)
def test_figures_equal_the_compiled_analysis(case):
    found = case.plan()
    prefill, decode = case.compiled()
    model, state, _, request = case.arguments()
    # What is there from call to call is exact. On a CPU the host store is an argument
    # like the others. (Prefill makes no use of the request's step count.)
    assert found.persistent + found.host == tree_bytes((model, state))
    used = found.persistent + found.host + tree_bytes(request)
    blocks = found.capacity // case.settings.sparse.block_size
    if not case.settings.selector.lists_blocks(blocks, case.settings.sparse):
        # Where every block is read, heads are held, but passed to no program.
        used -= found.forecast_heads
    assert decode.argument_size_in_bytes == used
    used += tree_bytes(case.prefill_arguments()) - request.steps.nbytes
    used -= tree_bytes(request)
    assert prefill.argument_size_in_bytes == used
    assert prefill.alias_size_in_bytes == tree_bytes(state)
    assert found.prefill_peak + found.host == pytest.approx(_peak(prefill), rel=0.05)
    assert found.decode_peak + found.host == pytest.approx(_peak(decode), rel=0.05)
    # The estimates alone, which are the smaller part of a peak.
    scratch = found.prefill_peak - found.persistent
    assert scratch == pytest.approx(prefill.temp_size_in_bytes, rel=0.15)


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
    [
        pytest.param("resident", 32512, marks=pytest.mark.long),
        pytest.param("offload", 32512, marks=pytest.mark.long),
        ("offload", 130816),
    ],
)
def test_8b_figures_equal_the_compiled_analysis(kind, prompt):
    """In float32: a CPU turns bfloat16 weights into it, and other devices do not."""
    case = _8b(kind, prompt, "float32")
    found = case.plan()
    prefill, decode = case.compiled()
    state = case.arguments()[1]
    assert prefill.alias_size_in_bytes == tree_bytes(state), "the store is in place"
    assert found.prefill_peak + found.host == pytest.approx(_peak(prefill), rel=0.02)
    assert found.decode_peak + found.host == pytest.approx(_peak(decode), rel=0.02)
    scratch = found.prefill_peak - found.persistent
    assert scratch == pytest.approx(prefill.temp_size_in_bytes, rel=0.15)


@pytest.mark.slow
def test_8b_with_many_rows_fits_80_gb():
    """64 rows of 128k, 8 bits a number in host memory, three lists' worth of slots."""
    many = dataclasses.replace(
        _8b("offload", 130816, "bfloat16"),
        batch=64,
        chunk=8192,
        codec="int8",
        slots=288,
        storage="per_layer",
    )
    assert many.plan().device < 80e9
    assert many.plan().host < 150 * 2**30
    wide = dataclasses.replace(many, dtype="float32", storage="stacked")
    found = wide.plan()
    prefill, decode = wide.compiled()
    assert found.prefill_peak + found.host == pytest.approx(_peak(prefill), rel=0.05)
    assert found.decode_peak + found.host == pytest.approx(_peak(decode), rel=0.05)


@pytest.mark.parametrize(
    "case",
    [
        Case(storage="per_layer", batch=3),
        Case("nosa", kind="offload", preset="tiny-nosa", batch=3, slots=11),
        Case(kind="offload", storage="per_layer", layer0="offload", batch=1),
        Case("snapkv", kind="evict", preset="tiny-nosa", batch=3),
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
        assert found.staging == tree_bytes(state.cache.staging)


def test_8b_device_bytes_grow_by_keys_and_scratch_alone():
    """From 32k to 128k an offloaded cache's slots and staging stay."""
    short, long = (
        Case(kind="offload", preset="minicpm4.1-8b", prompt=p, chunk=8192, tile=1024)
        for p in (32512, 130816)
    )
    a, b = short.plan(), long.plan()
    assert (a.capacity, b.capacity) == (32768, 131072)
    for same in ("weights", "forecast_heads", "slots", "staging"):
        assert getattr(a, same) == getattr(b, same) > 0
    assert b.generation == a.generation
    assert b.prompt_states == a.prompt_states
    for grown in ("kv", "kv_scratch", "host"):
        assert getattr(b, grown) == 4 * getattr(a, grown) > 0
    config = MINICPM.model
    pages = 98304 // 64 * config.num_kv_heads * 4
    rows = b.batch * (config.num_layers - 1)
    assert b.slot_tables - a.slot_tables == rows * pages
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
