"""Block scores and the choice of blocks against their definitions, and their edges."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import in_ci, slow_but

from pallas_kernels import block_scores, select_blocks
from pallas_kernels._common.tolerances import relative_error
from pallas_kernels.block_scores.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.block_scores.operands import checked
from pallas_kernels.block_scores.pallas_triton import (
    block_scores_triton,
    select_blocks_triton,
)
from pallas_kernels.block_scores.reference import block_scores_reference
from pallas_kernels.choose_blocks.reference import choose_blocks_reference

CI_SPECS = in_ci(ARG_SPECS)
BY_NAME = {s.name: s for s in ARG_SPECS}
QUICK = {"raw_ragged", "softmax_g4"}
# Accumulated in float32 whatever the inputs; exp of a difference of logits.
TOLERANCE = 3e-6
SIZES = {"block_size": 64, "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1}

specs = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, id=s.name, marks=() if s.name in QUICK else pytest.mark.slow)
        for s in CI_SPECS
    ],
)


def operands_of(args):
    """What implementations take."""
    args = dict(args)
    local = args.pop("local_blocks", 33)
    mask = args.pop("mask_future_blocks", True)
    named = ("query", "compressed_keys", "q_start", "num_windows", "layer", "softmax")
    return checked(
        *map(args.get, named),
        args.get("scale"),
        blocks=args["blocks"],
        local_blocks=local,
        mask_future_blocks=mask,
        **SIZES,
    )


def reference(args):
    return jax.jit(block_scores_reference)(operands_of(args))


def own_blocks(args):
    """[B, 1, T]"""
    tokens = args["query"].shape[1]
    return (np.asarray(args["q_start"])[:, None, None] + np.arange(tokens)) // 64


def run(f, args, **more):
    """Compiles ``f`` with the arrays of ``args`` as its arguments."""
    arrays = {n: x for n, x in args.items() if isinstance(x, jax.Array)}
    rest = {n: x for n, x in args.items() if n not in arrays}
    return jax.jit(lambda a: f(**a, **rest, **more))(arrays)


def assert_scores(got, want):
    for x, ref, name in zip(got, want, ("scores", "lse"), strict=True):
        error = relative_error(x, ref)
        assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


@specs
def test_xla_matches_reference_and_chooses_what_it_scores(spec):
    args = spec.make("float32")
    got = run(block_scores, args, return_lse=True, implementation="xla")
    assert got[0].dtype == jnp.float32
    assert_scores(got, reference(args))
    lists = run(select_blocks, args, budget=spec.budget, implementation="xla")
    want = choose_blocks_reference(np.asarray(got[0]), own_blocks(args), spec.budget)
    np.testing.assert_array_equal(np.sort(lists), np.sort(want))


@pytest.mark.parametrize("softmax", slow_but({True}, (False, True)))
@pytest.mark.parametrize("head_dim", slow_but({64}, (64, 256)))
def test_every_length_twice(softmax, head_dim):
    """Rows of 1 … 200 keys, each with its last query; two runs are the same bits."""
    spec = ArgSpec(
        "", 200, 1, 4, 2, head_dim, 15, 4, start=tuple(range(200)), softmax=softmax
    )
    args = spec.make("float32")
    if not softmax:
        args["query"] = args["query"][:, :, :2]
    first, second = (
        run(block_scores, args, return_lse=True, implementation="xla") for _ in "12"
    )
    assert_scores(first, reference(args))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, id=s.name, marks=() if s.name == "raw" else pytest.mark.slow)
        for s in CI_SPECS
    ],
)
def test_triton_in_the_interpreter(spec):
    args = spec.make("float32")
    operands = operands_of(args)
    f = functools.partial(block_scores_triton, interpret=True)
    got = jax.jit(f)(operands)
    assert_scores(got, reference(args))
    f = functools.partial(
        select_blocks_triton, budget=spec.budget, interpret=True, slab=32
    )
    lists, lse = jax.jit(f)(operands)
    want = choose_blocks_reference(np.asarray(got[0]), own_blocks(args), spec.budget)
    np.testing.assert_array_equal(lists, want)
    assert relative_error(lse, got[1]) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("softmax", [False, True], ids=["raw", "softmax"])
def test_native_long_and_repeatable(softmax, implementation):
    # Several tiles of tokens, blocks and windows, and a tail of each.
    spec = ArgSpec("", 1, 1100, 8 if softmax else 2, 2, 128, 520, 131, start=(7000,))
    spec = dataclasses.replace(spec, softmax=softmax, local=3, budget=40)
    args = spec.make("bfloat16")
    got = run(block_scores, args, return_lse=True, implementation=implementation)
    for x, ref in zip(got, reference(args), strict=True):
        assert relative_error(x, ref) <= 2e-5
    again = run(block_scores, args, return_lse=True, implementation=implementation)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("name", ["raw_ragged", "softmax_g16_layers"])
def test_native_windows_that_do_not_exist_never_leak(name, implementation):
    args = BY_NAME[name].make("bfloat16")
    clean = run(block_scores, args, return_lse=True, implementation=implementation)
    windows = args["compressed_keys"].shape[-2]
    exists = np.arange(windows) < np.asarray(args["num_windows"])[:, None]
    for poison in (np.nan, np.inf):
        keys = args["compressed_keys"]
        keys = jnp.where(exists[:, None, :, None], keys, poison)
        dirty = args | {"compressed_keys": keys}
        dirty = run(block_scores, dirty, return_lse=True, implementation=implementation)
        for x, y in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", CI_SPECS, ids=lambda s: s.name)
def test_native(spec, dtype, implementation):
    args = spec.make(dtype)
    try:
        got = run(block_scores, args, return_lse=True, implementation=implementation)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    for x, ref in zip(got, reference(args), strict=True):
        assert relative_error(x, ref) <= 2e-5
    lists = run(select_blocks, args, budget=spec.budget, implementation=implementation)
    want = choose_blocks_reference(np.asarray(got[0]), own_blocks(args), spec.budget)
    np.testing.assert_array_equal(np.sort(lists), np.sort(want))


@pytest.mark.slow  # through a model: `test_decode_row_is_prefill_row`
def test_a_prefill_row_chooses_what_decode_chooses():
    spec = dataclasses.replace(BY_NAME["raw"], batch=1, start=(700,))
    args = spec.make("float32")
    whole = np.sort(run(select_blocks, args, budget=6))
    for t in (0, 33, 69):
        position = 700 + t
        row = args | {
            "query": args["query"][:, t : t + 1],
            "q_start": jnp.array([position], jnp.int32),
            "num_windows": jnp.array([(position + 1 - 32) // 16 + 1], jnp.int32),
        }
        lists = np.sort(run(select_blocks, row, budget=6))
        np.testing.assert_array_equal(lists[:, :, 0], whole[:, :, t])


def test_forced_blocks_are_listed_and_future_ones_are_not():
    args = BY_NAME["raw"].make("float32")
    lists = np.asarray(run(select_blocks, args, budget=6))
    own = own_blocks(args)[:, 0]
    for b, k, t in np.ndindex(lists.shape[:3]):
        row = set(lists[b, k, t].tolist()) - {-1}
        assert max(row) == own[b, t]
        assert {0, max(0, own[b, t] - 1), own[b, t]} <= row
        assert len(row) == min(6, own[b, t] + 1)


def test_without_the_mask_future_blocks_take_places_and_are_dropped():
    args = dataclasses.replace(BY_NAME["raw"], start=(820,)).make("float32")
    args["mask_future_blocks"] = False
    scores = np.asarray(run(block_scores, args))
    lists = np.asarray(run(select_blocks, args, budget=6))
    want = choose_blocks_reference(scores, own_blocks(args), 6)
    np.testing.assert_array_equal(np.sort(lists), np.sort(want))
    assert (lists == -1).any(), "no future block ever won: the case tests nothing"


def test_ties_go_to_the_lowest_block():
    args = BY_NAME["raw"].make("float32")
    args["compressed_keys"] = jnp.ones_like(args["compressed_keys"])
    args["q_start"] = jnp.array([700, 900], jnp.int32)
    lists = np.sort(run(select_blocks, args, budget=6))
    own = own_blocks(args)[:, 0]
    for b, k, t in np.ndindex(lists.shape[:3]):
        q = own[b, t]
        assert lists[b, k, t].tolist() == [0, 1, 2, 3, q - 1, q]


def test_windows_that_do_not_exist_never_leak():
    args = BY_NAME["raw_ragged"].make("float32")
    clean = run(block_scores, args, return_lse=True)
    exists = np.arange(70) < np.asarray(args["num_windows"])[:, None]
    for poison in (np.nan, np.inf):
        keys = args["compressed_keys"]
        keys = jnp.where(exists[:, None, :, None], keys, poison)
        dirty = run(block_scores, args | {"compressed_keys": keys}, return_lse=True)
        for x, y in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(x, y)


def test_softmax_weights_sum_to_the_group():
    # One window a block and no forced block: scores are the weights themselves.
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((1, 1, 8, 64)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((1, 2, 40, 64)), jnp.float32)
    args = {
        "query": query,
        "compressed_keys": keys,
        "q_start": jnp.array([16 * 41], jnp.int32),
        "blocks": 40,
        "block_size": 16,
        "kernel_size": 16,
        "kernel_stride": 16,
        "init_blocks": 0,
        "local_blocks": 0,
        "softmax": True,
    }
    scores = run(block_scores, args)
    np.testing.assert_allclose(scores.sum(-1), 4.0, rtol=1e-5)


def memory_of_long(op, softmax, implementation):
    """Tokens and heads of a call over 128k tokens, and the compiler's figures."""
    tokens, heads = 131072, 32 if softmax else 2
    arrays = {
        "query": jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16),
        "compressed_keys": jax.ShapeDtypeStruct((1, 2, 8191, 128), jnp.bfloat16),
        "q_start": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    call = functools.partial(
        op, blocks=2048, softmax=softmax, implementation=implementation
    )
    return tokens, heads, jax.jit(call).lower(**arrays).compile().memory_analysis()


@pytest.mark.parametrize("softmax", slow_but({True}, (False, True)))
@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("triton", marks=pytest.mark.gpu),
        pytest.param("mosaic_gpu", marks=pytest.mark.gpu),
    ],
)
def test_no_buffer_of_tokens_times_windows(softmax, implementation):
    tokens, heads, memory = memory_of_long(
        functools.partial(select_blocks, budget=96), softmax, implementation
    )
    # T x W float32 scores of both kv heads would be 8 GiB; copies of the query in
    # float32 and the lists are what is left, and they grow with T alone.
    linear = tokens * (heads * 128 * 4 + 2 * 96 * 4)
    assert memory.temp_size_in_bytes <= 3 * linear + 400 * 2**20


@pytest.mark.parametrize("softmax", slow_but({True}, (False, True)))
def test_scores_of_blocks_need_no_scores_of_windows(softmax):
    tokens, heads, memory = memory_of_long(block_scores, softmax, "xla")
    # Tiles of the result before they are put in order, and copies of the query.
    linear = tokens * heads * 128 * 4
    assert memory.output_size_in_bytes == 2 * tokens * 2048 * 4
    assert memory.temp_size_in_bytes <= (
        memory.output_size_in_bytes + 2 * linear + 64 * 2**20
    )
    assert memory.temp_size_in_bytes < 2 * tokens * 8191 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": jnp.zeros((2, 70, 2))}, "query has shape"),
        ({"query": jnp.zeros((2, 70, 4, 64))}, "the raw form takes one head"),
        (
            {"query": jnp.zeros((2, 70, 2, 64), jnp.float16)},
            "compressed_keys has dtype",
        ),
        ({"layer": 0}, "a leading L axis exactly when layer is given"),
        ({"q_start": jnp.zeros((1,), jnp.int32)}, "q_start has shape"),
        ({"num_windows": jnp.zeros((2,))}, "num_windows has dtype"),
        ({"blocks": 0}, "blocks is 0"),
        ({"local_blocks": -1}, "local_blocks is -1"),
        ({"block_size": 40}, "block_size is 40"),
        ({"kernel_size": 24}, "kernel_size is 24"),
        ({"budget": -3}, "budget is -3"),
        ({"budget": 0}, "budget is 0"),
    ],
)
def test_bad_arguments(change, message, without_type_checks):
    args = BY_NAME["raw"].make("float32") | {"budget": 4} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        select_blocks(**args)
