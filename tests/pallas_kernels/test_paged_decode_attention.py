"""Paged decode attention against its float32 definition, and its edges."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    assert_attention_matches,
    slow_but,
)

from pallas_kernels import paged_decode_attention
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels.lowering import cuda_lowering_text
from pallas_kernels.paged_decode_attention import pallas_mosaic_gpu as mosaic
from pallas_kernels.paged_decode_attention import pallas_triton as triton
from pallas_kernels.paged_decode_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.paged_decode_attention.operands import checked
from pallas_kernels.paged_decode_attention.pallas_triton import (
    paged_decode_attention_triton,
)
from pallas_kernels.paged_decode_attention.reference import (
    paged_decode_attention_reference,
)

BY_NAME = {s.name: s for s in ARG_SPECS}

# Compiled whole, once for each set of shapes.
COMPILED_REFERENCE = jax.jit(paged_decode_attention_reference)


def reference(args):
    return COMPILED_REFERENCE(checked(**args))


def compute(args, implementation="xla"):
    return jax.jit(
        lambda a: paged_decode_attention(
            **a, return_lse=True, implementation=implementation
        )
    )(args)


def test_triton_with_one_split_and_with_many():
    spec = BY_NAME["listed_g16_layers_bias"]
    args = spec.make(jnp.float32)
    for splits in (1, 3):
        run = functools.partial(
            paged_decode_attention_triton,
            config=triton.Config(splits=splits),
            interpret=True,
        )
        got = jax.jit(run)(checked(**args))
        assert_attention_matches(got, reference(args), "float32")


def in_8_bits(args, seed=3):
    """Arguments with slots in 8 bits, and the same as slots of numbers: an oracle.

    The tail is one more slot there, at the end of each list.
    """
    random = np.random.default_rng(seed)
    kv, q = args["kv"], args["q"]
    *lead, slots, block, _, dim = kv.shape
    whole = random.integers(-127, 128, kv.shape, np.int8)
    scales = random.uniform(0.001, 0.02, (*lead, slots, 256)).astype(np.float32)
    tail = random.standard_normal((*lead, block, 2, dim)).astype(np.float32)
    tail = jnp.asarray(tail, q.dtype)
    tail_lengths = np.resize(np.asarray([block // 2, 0, block], np.int32), len(q))
    stored = args | {
        "kv": jnp.asarray(whole),
        "scales": jnp.asarray(scales),
        "tail": tail,
        "tail_lengths": jnp.asarray(tail_lengths),
    }
    both = whole.astype(np.float32)
    both[..., 0, :] *= scales[..., None, :dim]
    both[..., 1, :] *= scales[..., dim : dim + block, None]
    tail = np.asarray(tail, np.float32)[..., None, :, :, :]
    kv = jnp.asarray(np.concatenate((both, tail), axis=-4), jnp.float32)
    shape = (*args["slots"].shape[:2], 1)
    own = jnp.broadcast_to(jnp.int32(slots), shape)
    held = jnp.broadcast_to(jnp.asarray(tail_lengths)[:, None, None], shape)
    plain = args | {
        "q": q.astype(jnp.float32),
        "kv": kv,
        "slots": jnp.concatenate((args["slots"], own), -1),
        "slot_lengths": jnp.concatenate((args["slot_lengths"], held), -1),
    }
    return stored, plain


def test_slots_in_8_bits():
    """XLA and Triton against the float32 definition of the decoded numbers."""
    spec = ArgSpec("", 3, 6, 2, 16, 16, 6, listed=3, layers=2, lengths=(90, 30))
    stored, plain = in_8_bits(spec.make("float32"))
    want = reference(plain)
    assert_attention_matches(compute(stored), want, "float32")
    assert_attention_matches(reference(stored), want, "float32")
    run = functools.partial(
        paged_decode_attention_triton, config=triton.Config(splits=2), interpret=True
    )
    assert_attention_matches(jax.jit(run)(checked(**stored)), want, "float32")


def test_all_slots_in_8_bits_are_the_listed_ones():
    spec = ArgSpec("", 3, 6, 2, 16, 16, 40, listed=40, lengths=(640, 75))
    stored, plain = in_8_bits(spec.make("float32"))
    all_slots = {"slots": None, "slot_lengths": None}
    lengths = all_slots | {"lengths": jnp.array([640, 75, 640])}
    got = compute(stored | lengths)
    assert_attention_matches(got, reference(plain), "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("batch", [1, 16, 100])
def test_native_slots_in_8_bits(implementation, batch):
    spec = ArgSpec("", batch, 32, 2, 128, 64, 187, listed=96, padding=0.1)
    stored, plain = in_8_bits(spec.make("bfloat16"))
    got = compute(stored, implementation)
    assert_attention_matches(got, reference(plain), "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": None}, "must be given together"),
        ({"scales": None}, "must be given together"),
        ({"scales": jnp.zeros((1, 2, 12, 100))}, "scales has 100 a slot"),
        ({"scales": jnp.zeros((1, 2, 11, 256))}, "scales has shape"),
        ({"tail": jnp.zeros((1, 2, 32, 2, 64))}, "tail has shape"),
        ({"tail_lengths": jnp.zeros((2,), jnp.int32)}, "tail_lengths has shape"),
        ({"kv": jnp.zeros((1, 2, 12, 64, 2, 64))}, "kv has dtype"),
        ({"key_bias": jnp.zeros((1, 2, 12, 64))}, "key_bias must not be given"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu"),
    ],
)
def test_bad_arguments_in_8_bits(change, message, without_type_checks):
    spec = ArgSpec("", 1, 6, 2, 64, 64, 12, listed=5)
    stored, _ = in_8_bits(spec.make("float32"))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        paged_decode_attention(**stored | change)


MOSAIC_CONFIGS = [
    mosaic.Config(1, 2),
    mosaic.Config(1, 6, 1, 2),
    mosaic.Config(3, 3),
    mosaic.Config(2, 2, 2),
    mosaic.Config(8, 2, 8),
    mosaic.Config(8, 4, 8, 2),
    mosaic.Config(8, 6, 4),
]
configs = pytest.mark.parametrize(
    "config",
    MOSAIC_CONFIGS,
    ids=lambda c: f"{c.splits}_{c.stages}_{c.cluster}_{c.warpgroups}",
)


def mosaic_with(config, args, return_text=False):
    form = functools.partial(mosaic.paged_decode_attention_mosaic_gpu, config=config)
    if return_text:
        return cuda_lowering_text(lambda a: form(checked(**a)), args)
    return jax.jit(form)(checked(**args))


def test_mosaic_merges_within_a_cluster_without_another_kernel():
    args = BY_NAME["listed_g16_layers_bias"].make("bfloat16")
    text = mosaic_with(mosaic.Config(8, 4, 8, 2), args, return_text=True)
    assert text.count("mosaic_gpu_v2") == 1
    assert "exponential" not in text
    text = mosaic_with(mosaic.Config(8, 2, 4), args, return_text=True)
    assert "exponential" in text, "two clusters a pair are merged by XLA"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["listed_g16_layers_bias", "dense_g3_layers"])
@configs
def test_native_mosaic_with_every_config(config, name):
    args = BY_NAME[name].make("bfloat16")
    got = mosaic_with(config, args)
    assert_attention_matches(got, reference(args), "bfloat16")
    for x, y in zip(got, mosaic_with(config, args), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_native_mosaic_many_slots():
    # Every stage of the ring is used again and again, the lists are ragged.
    spec = ArgSpec("", 8, 32, 2, 128, 64, 128, listed=96, padding=0.1)
    args = dataclasses.replace(spec, lengths=(8000, 5000, 64, 1)).make("bfloat16")
    want = reference(args)
    for config in (mosaic.Config(8, 4, 8, 2), mosaic.Config(8, 3, 8), mosaic.Config(1)):
        for _ in range(5):
            assert_attention_matches(mosaic_with(config, args), want, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
def test_native_never_leaks_what_is_not_listed(implementation):
    args = BY_NAME["listed_g16_layers_bias"].make(jnp.bfloat16)
    clean = compute(args, implementation)
    for poison in (np.nan, np.inf):
        dirty = compute(poisoned(args, poison), implementation)
        for x, y in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("groups", slow_but({3}, (1, 3, 4, 8, 16)))
def test_ragged_tails(groups):
    spec = ArgSpec("", 1, 2 * groups, 2, 64, 32, 7)
    args = spec.make(jnp.float32)
    f = jax.jit(lambda a: paged_decode_attention(**a, return_lse=True))
    for length in (1, 2, 31, 32, 33, 127, 200):
        args["lengths"] = jnp.array([length], jnp.int32)
        got, row = f(args), reference(args)
        assert_attention_matches(got, row, "float32")


def test_every_length():
    """Rows of 1 … 200 keys in one call."""
    spec = ArgSpec("", 200, 6, 2, 64, 16, 13, lengths=tuple(range(1, 201)))
    args = spec.make(jnp.float32)
    assert_attention_matches(compute(args), reference(args), "float32")


def test_identity_list_is_dense():
    spec = ArgSpec("", 2, 8, 2, 64, 32, 6, lengths=(170, 64))
    dense = spec.make(jnp.float32)
    slots = jnp.broadcast_to(jnp.arange(6), (2, 2, 6))
    slot_lengths = jnp.clip(dense["lengths"][:, None, None] - slots * 32, 0, 32)
    listed = {"q": dense["q"], "kv": dense["kv"], "slots": slots}
    listed["slot_lengths"] = slot_lengths
    for x, y in zip(compute(dense), compute(listed), strict=True):
        assert relative_error(x, y) <= tolerance("float32")


def test_order_of_the_list_carries_no_meaning():
    spec = ArgSpec("", 1, 6, 2, 64, 16, 12, listed=9, lengths=(190,), padding=0.2)
    args = spec.make(jnp.float32)
    shuffle = np.random.default_rng(1).permutation(9)
    other = args | {
        "slots": args["slots"][..., shuffle],
        "slot_lengths": args["slot_lengths"][..., shuffle],
    }
    for x, y in zip(compute(args), compute(other), strict=True):
        assert relative_error(x, y) <= tolerance("float32")


def poisoned(args, poison):
    """The arguments with every key and value that is not listed replaced."""
    lead = args["kv"].ndim - 6
    valid = np.zeros(args["kv"].shape[lead:-2], bool)
    slots, lengths = np.asarray(args["slots"]), np.asarray(args["slot_lengths"])
    for b, k, p in np.ndindex(slots.shape):
        if slots[b, k, p] >= 0:
            valid[b, k, slots[b, k, p], : lengths[b, k, p]] = True
    if lead:  # of the layers only the one that is read
        chosen = np.arange(args["kv"].shape[0]) == int(args["layer"])
        valid = valid & chosen[:, None, None, None, None]
    return args | {
        "kv": jnp.where(valid[..., None, None], args["kv"], poison),
        "key_bias": jnp.where(valid, args["key_bias"], poison),
    }


def test_what_is_not_listed_never_leaks():
    spec = ArgSpec(
        "", 2, 6, 2, 64, 16, 12, listed=5, lengths=(190, 75), padding=0.2, bias=True
    )
    args = spec.make(jnp.float32)
    f = jax.jit(lambda a: paged_decode_attention(**a, return_lse=True))
    clean = f(args)
    for poison in (np.nan, np.inf, -np.inf):
        for x, y in zip(f(poisoned(args, poison)), clean, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_beyond_the_length_never_leaks(poison):
    args = ArgSpec("", 2, 6, 2, 64, 16, 50, lengths=(530, 75)).make(jnp.float32)
    clean = compute(args)
    position = np.arange(800).reshape(50, 16)
    valid = position < np.asarray(args["lengths"])[:, None, None, None]
    args["kv"] = jnp.where(valid[..., None, None], args["kv"], poison)
    for x, y in zip(compute(args), clean, strict=True):
        np.testing.assert_array_equal(x, y)


def test_rows_without_keys_are_zero():
    args = ArgSpec("", 3, 4, 2, 64, 16, 4, lengths=(0, 5, -3)).make(jnp.float32)
    out, lse = compute(args)
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_array_equal(out[2], 0.0)
    assert np.isneginf(lse[0]).all() and np.isneginf(lse[2]).all()
    assert np.isfinite(lse[1]).all()


def test_lengths_beyond_capacity_mean_all_of_it():
    spec = ArgSpec("", 1, 4, 2, 64, 16, 4, lengths=(64,))
    args = spec.make(jnp.float32)
    more = args | {"lengths": jnp.array([1000], jnp.int32)}
    for x, y in zip(compute(args), compute(more), strict=True):
        np.testing.assert_array_equal(x, y)


def test_partial_results_merge_through_lse():
    args = ArgSpec("", 1, 6, 2, 64, 16, 12, listed=10, lengths=(190,)).make("float32")
    whole, whole_lse = compute(args)
    parts = [
        compute(
            args
            | {
                "slots": args["slots"][..., part],
                "slot_lengths": args["slot_lengths"][..., part],
            }
        )
        for part in (slice(0, 4), slice(4, None))
    ]
    lses = jnp.stack([lse for _, lse in parts])
    lse = jax.nn.logsumexp(lses, 0)
    merged = sum(out * jnp.exp(x - lse)[..., None] for out, x in parts)
    assert relative_error(lse, whole_lse) <= tolerance("float32")
    assert relative_error(merged, whole) <= tolerance("float32")


def test_two_runs_are_bitwise_equal():
    args = BY_NAME["listed_g16_layers_bias"].make(jnp.float32)
    f = jax.jit(lambda a: paged_decode_attention(**a, return_lse=True))
    for x, y in zip(f(args), f(args), strict=True):
        np.testing.assert_array_equal(x, y)


def test_layer_may_be_traced_and_the_stack_is_not_copied():
    spec = ArgSpec("", 1, 6, 2, 64, 64, 32, listed=4, layers=16)
    args = spec.make(jnp.float32)
    del args["layer"]

    def all_layers(a):
        def body(layer, total):
            return total + paged_decode_attention(**a, layer=layer)

        return jax.lax.fori_loop(0, 16, body, jnp.zeros_like(a["q"]))

    compiled = jax.jit(all_layers).lower(args).compile()
    one_layer = args["kv"].nbytes // 16
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer
    want = sum(paged_decode_attention(**args, layer=i) for i in range(16))
    assert relative_error(compiled(args), want) <= tolerance("float32")


def test_unused_capacity_needs_no_memory():
    def temp(capacity):
        args = ArgSpec("", 1, 9, 3, 64, 64, capacity, lengths=(100,)).make("float32")
        f = jax.jit(lambda a: paged_decode_attention(**a))
        return f.lower(args).compile().memory_analysis().temp_size_in_bytes

    assert temp(512) <= temp(16) + 4096


def test_one_chunk_is_read_without_a_loop():
    """A loop would have what does not change copied in front of it: a row's values."""

    def loops(capacity):
        args = ArgSpec("", 1, 9, 3, 64, 64, capacity, lengths=(100,)).make("float32")
        return str(jax.make_jaxpr(lambda a: compute(a))(args)).count("while[")

    assert loops(8) == 0 and loops(9) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 6))}, "q has shape"),
        ({"q": jnp.zeros((2, 5, 64))}, "must be a positive multiple"),
        ({"q": jnp.zeros((2, 6, 32))}, "kv has shape"),
        ({"q": jnp.zeros((2, 6, 64), jnp.int32)}, "q has dtype"),
        ({"q": jnp.zeros((2, 6, 64), jnp.bfloat16)}, "kv has dtype"),
        ({"kv": jnp.zeros((2, 2, 4, 16, 3, 64))}, "kv has shape"),
        ({"kv": jnp.zeros((1, 2, 2, 4, 16, 2, 64))}, "pass layer exactly when"),
        ({"layer": 0}, "pass layer exactly when"),
        ({"lengths": None}, "lengths must be given"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, "lengths has shape"),
        ({"lengths": jnp.zeros((2,))}, "lengths has dtype"),
        ({"slot_lengths": jnp.zeros((2, 2, 3), jnp.int32)}, "slot_lengths must not"),
        ({"slots": jnp.zeros((2, 2, 3), jnp.int32)}, "slot_lengths must be given"),
        ({"key_bias": jnp.zeros((2, 2, 4, 15))}, "key_bias has shape"),
        ({"key_bias": jnp.zeros((2, 2, 4, 16), jnp.bfloat16)}, "key_bias has dtype"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = ArgSpec("", 2, 6, 2, 64, 16, 4).make(jnp.float32) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_decode_attention(**args)


def test_bad_layer_index():
    args = ArgSpec("", 2, 6, 2, 64, 16, 4, layers=2).make(jnp.float32)
    with pytest.raises(ValueError, match="layer is 2"):
        paged_decode_attention(**args | {"layer": 2})
