"""Block-sparse attention against its float32 definition, and its edges."""

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

from pallas_kernels import block_sparse_attention, paged_decode_attention
from pallas_kernels._common.tolerances import (
    GRADIENT_FACTOR,
    relative_error,
    tolerance,
)
from pallas_kernels.block_sparse_attention import pallas_mosaic_gpu as mosaic
from pallas_kernels.block_sparse_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.block_sparse_attention.operands import checked
from pallas_kernels.block_sparse_attention.reference import (
    block_sparse_attention_reference,
)
from pallas_kernels.lowering import cuda_lowering_text

BY_NAME = {s.name: s for s in ARG_SPECS}

# Compiled whole, once for each set of shapes.
COMPILED_REFERENCE = jax.jit(block_sparse_attention_reference)


def reference(args):
    return COMPILED_REFERENCE(checked(**args))


def compute(args, implementation="xla"):
    return jax.jit(
        lambda a: block_sparse_attention(
            **a, return_lse=True, implementation=implementation
        )
    )(args)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
def test_native_never_leaks_what_a_token_does_not_list(implementation):
    spec = ArgSpec(
        "", 1, 40, 32, 2, 128, 64, 16, listed=4, local=1, start=(900,), bias=True
    )
    args = spec.make(jnp.bfloat16)
    clean = compute(args, implementation)
    for token, poison in ((0, np.nan), (21, np.inf), (39, np.nan)):
        valid = blocks_read(args, token)
        dirty = args | {
            "kv": jnp.where(valid[..., None, None], args["kv"], poison),
            "key_bias": jnp.where(valid, args["key_bias"], poison),
        }
        for x, y in zip(compute(dirty, implementation), clean, strict=True):
            assert relative_error(x[:, token], y[:, token]) <= tolerance("bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_native_long_sequence(implementation):
    # More keys than 16-bit offsets and the sizes where Triton was seen to fail.
    spec = ArgSpec("", 1, 64, 16, 1, 128, 64, 1024, listed=96, start=(65_000,))
    args = spec.make(jnp.bfloat16)
    got = compute(args, implementation)
    assert_attention_matches(got, compute(args, "xla"), "bfloat16")


IN_PLACE = ArgSpec("", 2, 24, 32, 2, 128, 64, 12, 5, 2, start=(600, 0), bias=True)


def _mosaic(args, in_place):
    """The Mosaic form, which reads queries where they are or in its own order."""
    *_, listed = args["block_indices"].shape
    config = dataclasses.replace(
        mosaic.config_for(16, 128, 64, listed), in_place=in_place
    )
    operands = checked(**args, scale=0.1)
    return mosaic.block_sparse_attention_mosaic_gpu(operands, config=config)


@pytest.mark.slow  # each form's lowering: test_every_op.py
def test_queries_in_place_lower_without_a_transpose():
    args = IN_PLACE.make(jnp.bfloat16)
    texts = [
        cuda_lowering_text(functools.partial(_mosaic, in_place=in_place), args)
        for in_place in (True, False)
    ]
    moved = [text.count("bf16>) -> tensor<2x2x24x16x128xbf16>") for text in texts]
    assert "mosaic_gpu" in texts[0] and moved[0] < moved[1]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [24, 21])
def test_native_queries_in_place_give_the_same_bits(tokens):
    args = dataclasses.replace(IN_PLACE, tokens=tokens).make(jnp.bfloat16)
    calls = [
        jax.jit(functools.partial(_mosaic, in_place=in_place))(args)
        for in_place in (True, False)
    ]
    for x, y in zip(*calls, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("listed", [None, 3])
@pytest.mark.parametrize("tokens", slow_but({17}, (1, 2, 15, 16, 17, 63, 65, 200)))
def test_lengths(tokens, listed):
    spec = ArgSpec("", 1, tokens, 6, 2, 64, 32, 9, listed=listed, start=(40,))
    args = spec.make(jnp.float32, seed=tokens)
    assert_attention_matches(compute(args), reference(args), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("listed", [None, 3])
def test_lengths_up_to_200(listed):
    """1 … 200 tokens, one program each: the first rows of the longest."""
    spec = ArgSpec("", 1, 200, 6, 2, 64, 32, 9, listed=listed, start=(40,))
    args = spec.make(jnp.float32)
    out, lse = reference(args)
    for tokens in (*range(1, 67), *range(67, 200, 7), 200):
        part = args | {"q": args["q"][:, :tokens]}
        if listed:
            part["block_indices"] = args["block_indices"][:, :, :tokens]
        want = out[:, :tokens], lse[:, :tokens]
        assert_attention_matches(compute(part), want, "float32")


@pytest.mark.parametrize("groups", slow_but({1}, (1, 3, 4, 8, 16)))
def test_groups(groups):
    spec = ArgSpec("", 1, 50, 2 * groups, 2, 64, 16, 12, listed=5, start=(130,))
    args = spec.make(jnp.float32)
    assert_attention_matches(compute(args), reference(args), "float32")


@pytest.mark.slow  # through a model: `test_all_blocks_selected_is_dense`
def test_every_block_listed_is_dense():
    args = ArgSpec("", 2, 130, 6, 2, 64, 32, 8, start=(100, 0)).make(jnp.float32)
    lists = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 2, 130, 8))
    lists = np.random.default_rng(0).permuted(lists, axis=-1)
    listed = compute(args | {"block_indices": jnp.asarray(lists)})
    for x, y in zip(compute(args), listed, strict=True):
        assert relative_error(x, y) <= tolerance("float32")


@pytest.mark.slow  # through a model: `test_decode_row_is_prefill_row`
def test_a_prefill_row_is_a_decode_row():
    spec = ArgSpec("", 1, 40, 6, 2, 64, 32, 8, listed=4, local=2, start=(200,))
    args = spec.make(jnp.float32)
    out, lse = compute(args)
    decode = jax.jit(
        lambda *a: paged_decode_attention(
            a[0], a[1], slots=a[2], slot_lengths=a[3], return_lse=True
        )
    )
    for t in (0, 17, 39):
        slots = args["block_indices"][:, :, t]
        lengths = jnp.clip(200 + t + 1 - slots * 32, 0, 32)
        row, row_lse = decode(
            args["q"][:, t], args["kv"], slots, jnp.where(slots < 0, 0, lengths)
        )
        assert relative_error(out[:, t], row) <= tolerance("float32")
        assert relative_error(lse[:, t], row_lse) <= tolerance("float32")


@pytest.mark.parametrize("listed", slow_but({4}, (None, 4)))
def test_chunked_is_whole(listed):
    spec = ArgSpec("", 1, 150, 6, 2, 64, 32, 8, listed=listed, local=2, start=(60,))
    args = spec.make(jnp.float32)
    whole = compute(args)
    parts = []
    part_of = jax.jit(lambda a: block_sparse_attention(**a, return_lse=True))
    for first, last in ((0, 50), (50, 100), (100, 150)):
        part = args | {
            "q": args["q"][:, first:last],
            "q_start": jnp.array([60 + first]),
        }
        if listed:
            part["block_indices"] = args["block_indices"][:, :, first:last]
        parts.append(part_of(part))
    for i in range(2):
        chunked = jnp.concatenate([p[i] for p in parts], 1)
        assert relative_error(chunked, whole[i]) <= tolerance("float32")


@pytest.mark.slow  # through a model: `test_padded_row_is_row_alone`
def test_a_batch_row_is_the_row_alone():
    spec = ArgSpec("", 3, 70, 6, 2, 64, 32, 8, listed=3, start=(0, 90, 180))
    args = spec.make(jnp.float32)
    out = compute(args)[0]
    alone = jax.jit(lambda a: block_sparse_attention(**a))
    for b in range(3):
        row = {name: x[b : b + 1] for name, x in args.items()}
        assert relative_error(alone(row), out[b : b + 1]) <= tolerance("float32")


def blocks_read(args, token):
    """Which [B, K, M, block] keys one token may read."""
    lists = np.asarray(args["block_indices"])[:, :, token]
    batch, kv_heads, blocks, block = args["kv"].shape[:4]
    listed = (lists[..., None] == np.arange(blocks)).any(2)
    key = np.arange(blocks * block).reshape(blocks, block)
    causal = key <= (np.asarray(args["q_start"]) + token)[:, None, None, None]
    return listed[..., None] & np.broadcast_to(causal, (batch, kv_heads, blocks, block))


def test_what_a_token_does_not_list_never_reaches_it():
    # The poisoned keys are in the union of the tile: its other tokens read them.
    spec = ArgSpec(
        "", 2, 40, 6, 2, 64, 16, 16, listed=4, local=1, start=(200, 3), bias=True
    )
    args = spec.make(jnp.float32)
    f = jax.jit(lambda a: block_sparse_attention(**a, return_lse=True))
    clean = f(args)
    for token in (0, 21, 39):
        valid = blocks_read(args, token)
        for poison in (np.nan, np.inf, -np.inf):
            dirty = args | {
                "kv": jnp.where(valid[..., None, None], args["kv"], poison),
                "key_bias": jnp.where(valid, args["key_bias"], poison),
            }
            for x, y in zip(f(dirty), clean, strict=True):
                np.testing.assert_array_equal(x[:, token], y[:, token])


def test_the_future_never_leaks():
    args = ArgSpec("", 1, 40, 6, 2, 64, 16, 16, start=(50,)).make(jnp.float32)
    f = jax.jit(lambda a: block_sparse_attention(**a, return_lse=True))
    clean = f(args)
    future = np.arange(256).reshape(16, 16) >= 50 + 20
    for poison in (np.nan, np.inf):
        kv = jnp.where(future[..., None, None], poison, args["kv"])
        for x, y in zip(f(args | {"kv": kv}), clean, strict=True):
            np.testing.assert_array_equal(x[:, :20], y[:, :20])


def test_a_poisoned_key_that_is_read_is_not_hidden():
    args = ArgSpec("", 1, 8, 4, 2, 64, 16, 2).make(jnp.float32)
    args["kv"] = args["kv"].at[0, :, 0, 3, 1].set(jnp.nan)
    out = compute(args)[0]
    assert np.isfinite(out[:, :3]).all()
    assert np.isnan(out[:, 3:]).all()


def test_tokens_without_keys_are_zero():
    args = ArgSpec("", 1, 10, 4, 2, 64, 16, 3, start=(-4,)).make(jnp.float32)
    out, lse = compute(args)
    np.testing.assert_array_equal(out[:, :4], 0.0)
    assert np.isneginf(lse[:, :4]).all()
    assert np.isfinite(lse[:, 4:]).all()


def test_two_runs_are_bitwise_equal():
    args = BY_NAME["random_g4"].make(jnp.float32)
    f = jax.jit(lambda a: block_sparse_attention(**a, return_lse=True))
    for x, y in zip(f(args), f(args), strict=True):
        np.testing.assert_array_equal(x, y)


GRADIENT_SPECS = [
    ArgSpec("dense", 2, 40, 6, 2, 64, 16, 6, start=(0, 50), bias=True),
    ArgSpec("listed", 2, 70, 6, 2, 64, 16, 12, listed=4, start=(90, 0), bias=True),
    ArgSpec("layers", 1, 20, 4, 2, 64, 16, 20, listed=4, local=2, layers=2),
    ArgSpec("long", 1, 600, 3, 1, 64, 64, 10, bias=True),
    ArgSpec("padded", 1, 24, 4, 2, 64, 16, 6, listed=3, padding=0.6, bias=True),
]


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            s,
            id=s.name,
            marks=pytest.mark.slow if s.name != "listed" else (),
        )
        for s in GRADIENT_SPECS
    ],
)
def test_gradients(spec):
    args = spec.make(jnp.float32)
    wrt = [name for name in ("q", "kv", "key_bias") if name in args]
    out, lse = reference(args)
    keys = jax.random.split(jax.random.key(0))
    w_out = jax.random.normal(keys[0], out.shape)
    w_lse = jax.random.normal(keys[1], lse.shape)

    def loss(f):
        def total(leaves):
            out, lse = f(args | leaves)
            # Rows without keys have lse = -inf, which no loss may use.
            return (out * w_out).sum() + jnp.where(lse > -1e30, lse * w_lse, 0).sum()

        return jax.grad(total)

    leaves = {name: args[name] for name in wrt}
    got = jax.jit(loss(compute))(leaves)
    want = jax.jit(loss(reference))(leaves)
    for name in wrt:
        assert got[name].dtype == args[name].dtype
        error = relative_error(got[name], want[name])
        assert error <= GRADIENT_FACTOR * tolerance("float32"), (name, error)


@pytest.mark.slow
def test_gradients_in_bfloat16():
    args = GRADIENT_SPECS[1].make(jnp.bfloat16)

    def loss(f):
        return jax.grad(lambda kv: f(args | {"kv": kv})[0].astype(jnp.float32).sum())

    got = jax.jit(loss(compute))(args["kv"])
    want = jax.jit(loss(reference))(args["kv"])
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) <= GRADIENT_FACTOR * tolerance("bfloat16")


@pytest.mark.slow  # as the scan over a model's layers: `test_scanned_is_unrolled`
def test_inside_scan_over_layers():
    spec = ArgSpec("", 1, 30, 6, 2, 64, 16, 10, listed=3, start=(100,), layers=4)
    args = spec.make(jnp.float32)
    del args["layer"]

    def scan(q):
        def body(q, layer):
            return block_sparse_attention(**args | {"q": q}, layer=layer), None

        return jax.lax.scan(body, q, jnp.arange(4))[0]

    one = jax.jit(lambda a, layer: block_sparse_attention(**a, layer=layer))
    want = args["q"]
    for layer in range(4):
        want = one(args | {"q": want}, jnp.int32(layer))
    assert relative_error(jax.jit(scan)(args["q"]), want) <= tolerance("float32")
    assert np.isfinite(jax.jit(jax.grad(lambda q: scan(q).sum()))(args["q"])).all()


@pytest.mark.parametrize("listed", [None, 96])
@pytest.mark.parametrize("tokens", slow_but({131072}, (512, 131072)))
def test_no_buffer_of_tokens_times_keys(tokens, listed):
    spec = ArgSpec("", 1, tokens, 32, 2, 128, 64, 2048, listed=listed)
    shapes = {
        "q": jax.ShapeDtypeStruct((1, tokens, 32, 128), jnp.bfloat16),
        "kv": jax.ShapeDtypeStruct((1, 2, 2048, 64, 2, 128), jnp.bfloat16),
        "q_start": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    if listed:
        lists = (1, 2, tokens, spec.listed)
        shapes["block_indices"] = jax.ShapeDtypeStruct(lists, jnp.int32)
    f = jax.jit(lambda a: block_sparse_attention(**a))
    memory = f.lower(shapes).compile().memory_analysis()
    # Copies of q and the output in other layouts and dtypes grow with T; T x S
    # booleans alone would be 16 GiB at the full length.
    linear = sum(np.prod(s.shape) * 4 for n, s in shapes.items() if n != "kv")
    assert memory.temp_size_in_bytes <= 4 * linear + 64 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 6, 64))}, "q has shape"),
        ({"q": jnp.zeros((2, 0, 6, 64))}, "T must be at least 1"),
        ({"q": jnp.zeros((2, 8, 5, 64))}, "must be a positive multiple"),
        ({"q": jnp.zeros((2, 8, 6, 32))}, "kv has shape"),
        ({"q": jnp.zeros((2, 8, 6, 64), jnp.float16)}, "kv has dtype"),
        ({"kv": jnp.zeros((3, 2, 4, 16, 2, 64))}, "kv has shape"),
        ({"layer": 0}, "pass layer exactly when"),
        ({"q_start": jnp.zeros((3,), jnp.int32)}, "q_start has shape"),
        ({"q_start": jnp.zeros((2,))}, "q_start has dtype"),
        ({"block_indices": jnp.zeros((2, 2, 7, 3), jnp.int32)}, "block_indices has"),
        ({"block_indices": jnp.zeros((2, 2, 8, 3))}, "block_indices has dtype"),
        ({"block_indices": jnp.zeros((2, 2, 8, 0), jnp.int32)}, "P must be >= 1"),
        ({"key_bias": jnp.zeros((2, 2, 4, 15))}, "key_bias has shape"),
        ({"scale": "big"}, "scale is 'big'"),
        ({"implementation": "pallas"}, "implementation is 'pallas'"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = ArgSpec("", 2, 8, 6, 2, 64, 16, 4).make(jnp.float32) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        block_sparse_attention(**args)
